"""How the outcomes of others' suites are judged and told; the suites themselves need an index."""

import json

from .suites.run import BEGIN, DOCUMENT, HERE, SUITES, exceptions, judge, put, table

TOLD = {"a::one": "passed", "a::two[x]": "failure", "a::two[y]": "passed", "a::three": "skipped"}


def test_what_does_not_pass_needs_a_reason_and_a_reason_something_that_does_not_pass():
    assert judge(TOLD, ["a::two", "a::three"]) == []
    assert judge(TOLD, ["a::two[x]"]) == ["a::three: skipped"]
    (stale,) = judge(TOLD, ["a::two", "a::three", "a::one"])
    assert stale.startswith("a::one: ")
    assert len(judge(TOLD, ["a::tw", "a::three"])) == 2


def test_the_document_has_what_was_recorded():
    assert set(exceptions()) <= set(SUITES)
    text = DOCUMENT.read_text()
    assert BEGIN in text
    assert put(text, table(json.loads((HERE / "counts.json").read_text()))) == text
