"""Chat templates of others: what transformers gives them, and an end to whatever they do."""

import sys

import pytest

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.text.chat_template import render_chat_template, takes_parts

CHAT = [{"role": "user", "content": "Yo"}]
GROWING = "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}"


def test_what_transformers_gives_a_template():
    template = "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ eos_token }}"
    assert render_chat_template(template, CHAT, eos_token="</s>") == "Yo</s>"
    assert render_chat_template("{{ tools is none }}{{ documents }}", CHAT) == "TrueNone"


def test_which_templates_want_a_content_in_parts():
    assert takes_parts("{% for m in messages %}{% for p in m.content %}{% endfor %}{% endfor %}")
    assert takes_parts("{% for p in m['content'] | selectattr('type') %}{% endfor %}")
    assert not takes_parts("{% for m in messages %}{{ m['content'] | trim }}{% endfor %}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{{ 'x' * 10**9 }}",
        "{{ [0] * 10**9 }}",
        "{{ 9 ** (10 ** 10) }}",
        "{{ 'x' | center(10**9) }}",
        "{{ 'x'.ljust(10**9) }}",
        "{{ 'x' | indent(10**9) }}",
        "{{ '%01000000000d' % 5 }}",
        "{{ '%*d' % (10**9, 5) }}",
        "{{ '{:>1000000000}'.format(5) }}",
        "{{ '%1000000000d' | format(5) }}",
        "{{ messages | tojson(indent=10**9) }}",
        "{{ range(10**9) | list }}",
        "{{ 'a'.translate({97: 'b' * 1000000}) }}",
        GROWING + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        GROWING + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        GROWING + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
        GROWING + "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
        GROWING + "{% set ns.x = ''.join([ns.x, ns.x]) %}{% endfor %}",
        GROWING + "{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
        GROWING + "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
        GROWING + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        GROWING + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x }}",
        "{{ 1 / 0 }}",
        "{{ messages.x.y }}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{% if 1 %}" * 3000,
        "{% include 'x' %}",
        "{{ 5.0 ** 9999 }}",
        "x" * 2_000_000,
    ],
    ids=range(32),
)
def test_templates_that_would_not_end_or_break(template):
    traced = sys.gettrace()
    with pytest.raises(UsageError, match="chat template") as caught:
        render_chat_template(template, CHAT)
    assert "\n" not in str(caught.value)
    assert sys.gettrace() is traced


def test_a_long_chat_stays_within_the_limits():
    turns = [{"role": "user", "content": "word " * 40}, {"role": "assistant", "content": "A"}] * 500
    template = (
        "{% set ns = namespace(text='') %}{% for m in messages %}{% set ns.text = ns.text ~ "
        "'<' + m.role + '>' ~ (m.content | trim | replace('w', 'W')) %}{% endfor %}{{ ns.text }}"
    )
    assert len(render_chat_template(template, turns)) > 100_000
