"""What every test of a wrong answer asks: did the check stop where it should, and does its help name the mistake?"""

from lora_edu.course import checks


def assert_found(report: checks.Report, step: str, words: str) -> None:
    """The check failed at ``step``, and symptom, question or fix has the words (one of several, between bars)."""
    assert report.status == "failed", report.text
    assert step in report.step, report.text
    assert report.symptom, report.text
    assert report.question, report.text
    assert report.fix, report.text
    said = f"{report.symptom} {report.question} {report.fix}"
    assert any(part in said for part in words.split("|")), report.text
