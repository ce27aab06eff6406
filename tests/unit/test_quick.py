"""What stored outputs depend on is set wherever a notebook runs, and the public names load when they are asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import lora_edu
from lora_edu.quick import ENVIRONMENT, SET_ON_IMPORT, full_size, is_quick, prepare_kernel


def test_full_size_is_for_a_while(monkeypatch):
    monkeypatch.delenv("LORA_EDU_RUN", raising=False)
    assert is_quick()
    with full_size():
        assert not is_quick()
    assert is_quick()
    monkeypatch.setenv("LORA_EDU_RUN", "quick")
    with full_size():
        assert not is_quick()
    assert is_quick()


def in_new_process(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.split()


def test_a_kernel_that_nobody_prepared_is_prepared_on_import():
    report = "; import lora_edu, os, torch; print(torch.get_num_threads(), *sorted(os.environ))"
    kernel = "; sys.modules['ipykernel'] = sys"
    for code in (f"import sys{kernel}", f"import sys, torch; torch.set_num_threads(1){kernel}"):
        threads, *names = in_new_process(code + report)
        assert threads == ENVIRONMENT["OMP_NUM_THREADS"]
        assert set(SET_ON_IMPORT) <= set(names)
        assert "HF_HUB_OFFLINE" not in names  # a learner may load any model
        assert in_new_process(code + report, OMP_NUM_THREADS="1")[0] == "1"  # what is set stays
        assert "TOKENIZERS_PARALLELISM" not in in_new_process(code + report, LORA_EDU_RUN="full")
    assert "TOKENIZERS_PARALLELISM" not in in_new_process("import sys" + report)  # a script is not a notebook


def test_a_wrong_word_does_not_stop_an_import(monkeypatch):
    monkeypatch.setenv("LORA_EDU_RUN", "fast")
    prepare_kernel()


def test_public_names_are_what_editors_are_told():
    tree = ast.parse(Path(lora_edu.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {alias.name: line.module for line in block.body for alias in line.names}
    assert told == lora_edu._HOMES
    assert set(lora_edu.__all__) <= set(dir(lora_edu))
    for name, module in told.items():
        assert getattr(lora_edu, name).__module__ == module
    assert not hasattr(lora_edu, "no_such_name")
