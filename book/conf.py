"""Sphinx settings of the book. Its pages are the lessons, laid out by ``lora_edu/course/publish/book.py``."""

import re

from myst_nb.sphinx_ import HideCodeCellNode

project = "lora-edu"
author = "the lora-edu contributors"
copyright = "the lora-edu contributors. Code: Apache-2.0. Prose and figures: CC BY 4.0"
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx.ext.mathjax"]
exclude_patterns = ["**/.ipynb_checkpoints"]

# Pages were executed before: what the book shows is what ran.
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_code_prompt_show = "Show the {type}"
nb_code_prompt_hide = "Hide the {type}"
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 4

# One file that ships with the book: it draws SVG and needs no fonts. Without the menu it never loads anything else.
mathjax_path = "mathjax/tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}

html_theme = "sphinx_book_theme"
html_title = "lora-edu"
html_static_path = ["_static"]
html_css_files = ["lora_edu.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_show_sourcelink = False
html_context = {"default_mode": "auto"}  # light or dark as the reader's system has it
html_theme_options = {
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "use_source_button": False,
    "use_repository_button": False,
}

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shapes"]
viewcode_line_numbers = True


def link_lessons(app, what, name, obj, options, lines):
    """In the API's docstrings, turn "lesson 03" and "lessons 03 and 04" into links, where the lesson has a page."""
    pages = {
        doc.removeprefix("lessons/")[:2]: doc for doc in app.env.found_docs if re.fullmatch(r"lessons/\d\d_\w+", doc)
    }

    def link(match):
        number = match.group(0)
        return f":doc:`{number} </{pages[number]}>`" if number in pages else number

    for index, line in enumerate(lines):
        lines[index] = re.sub(
            r"\b[Ll]essons? \d\d(?:(?:, | and |–)\d\d)*",
            lambda found: re.sub(r"\d\d", link, found.group(0)),
            line,
        )


def name_folds(app, doctree, docname):
    """A folded cell offers "the code", where MyST-NB says "the source"."""
    for fold in doctree.findall(HideCodeCellNode):
        for prompt in ("prompt_show", "prompt_hide"):
            fold[prompt] = fold[prompt].replace("source", "code")


def setup(app):
    app.connect("doctree-resolved", name_folds)
    app.connect("autodoc-process-docstring", link_lessons)
