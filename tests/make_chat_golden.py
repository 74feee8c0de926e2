#!/usr/bin/env python3
"""What Jinja makes of templates in which every construct of chat templates occurs.

usage: make_chat_golden.py > tests/golden/chat/golden.json

Needs transformers and jinja2; the cases are below.  A case is a template, the variables it is
rendered with, and the text, or "error" where Jinja refuses."""
import json
import re

from transformers.utils.chat_template_utils import _compile_jinja_template

MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "What is \"2 < 3\" & 'x'?\n\tSay."},
    {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "calc", "arguments": {
            "a": 1, "b": 2.5, "c": [True, None, "\u00e9"], "d": {}, "e": [],
            "f": {"g": {"h": 1e-7}},
            "i": 12345678901234567890123, "j": 1e22, "k": -0.0, "l": 100000.0, "m": 1e16}}}]},
    {"role": "tool", "content": "caf\u00e9 \u4e2d\u6587 \U0001f600"},
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image"},
                                 {"type": "text", "text": "two"}]},
]
CONTEXT = {"messages": MESSAGES, "tools": None, "n": 3, "pi": 3.25, "name": "World", "empty": "",
           "words": ["pear", "Apple", "fig", "apple"], "nested": [[1, [2, 3]], [4], []],
           "tree": [{"v": 1, "c": [{"v": 2, "c": []}, {"v": 3, "c": [{"v": 4, "c": []}]}]}],
           "d": {"b": 2, "a": 1, "C": 3}, "yes": True, "no": False, "nil": None,
           "items": [{"k": "x", "n": 2}, {"k": "y", "n": 1}, {"k": "z"}], "big": 10 ** 30}

EXPRESSIONS = """
1 + 2 * 3|- 7 // 2|-7 // 2|7 % -3|-7 % 3|7 / 2|2 ** 10|2 ** -1|2 ** 3 ** 2|-2 ** 2|1.5 * 2
7.5 // 2|1 + 2 ~ 3|'a' ~ 1 ~ none ~ true ~ 1.0|'ab' * 3|[1] * 2|[1] + [2]|(1,) + (2, 3)|'a' + 'b'
+n|-n|-pi|n > 2 and n < 4|n and empty|empty or 'x'|not n|not not n|not n == 3|not empty and yes
1 < 2 < 3|1 < 3 < 2|3 > 2 >= 2 != 1|1 == 1.0|true == 1|'a' < 'b'|[1, 2] < [1, 3]|(1, 2) == (1, 2)
[1] == (1,)|none == false|undefd == undefd2|big == big|big > 5|n != 3|1 in [1, 2]|'a' in 'cat'
'b' in d|3 not in [1]|'role' in messages[0]|4 in nested|'x' in undefd|n if yes else 'q'
n if no else 'q'|n if no|(n if no) is undefined|'a' if no else 'b' if no else 'c'|[1, 2, 3][0]
[1, 2, 3][-1]|[1, 2, 3][5]|d['a']|d.a|d['zz']|d.zz is defined|'abc'[1]|'abc'[-1]|'h\u00e9llo'[1]
'h\u00e9llo'[1:3]|'hello'[::-1]|'hello'[::2]|'hello'[-3:]|'hello'[:-3]|'hello'[4:1:-1]
[1, 2, 3, 4][1:3]|[1, 2, 3, 4][::-1]|[1, 2, 3, 4][-2:]|[1, 2, 3][10:]|(1, 2, 3)[1:]|[][0:2]
words[0][0]|messages[0].role|messages[-1].content[0].text|messages[0]['content']|messages | length
words.0|words[1].lower()|{'a': 1, 'b': [1, 2]}|{1: 2, none: 3}|{'a': 1, 'b': 2, 'a': 3}
(1, 'a', none)|(1,)|()|[]|{}|[1, 2.0, 'a', none, true]|"it's"|'say "hi"'
['it\\'s', "say \\"hi\\"", 'both \\' and "']|['\\n\\t\\\\', '\u00e9', '\\x07']|1.0|1e22|1e16
123456789012345.6|0.1|1e-5|0.0001|100.0|big|'a\\n\\tb'|'\\x41\\u00e9'|'\\d'|"a" "b" 'c'|true|True
none|None|false|false|lower|words is iterable|n is iterable|undefd is iterable|'s' is iterable
d is mapping|words is mapping|words is sequence|d is sequence|'s' is sequence|n is sequence
undefd is sequence|nil is none|n is none|n is number|pi is number|'3' is number|true is number
n is integer|true is integer|big is integer|pi is float|n is string|name is string|true is boolean
1 is boolean|true is true|1 is true|false is false|n is odd|n is even|n is divisibleby 3
n is divisibleby(2)|n is not divisibleby 2|n is eq 3|n is equalto(3)|n is == 3|n is ne 3|n is lt 4
n is gt(4)|n is ge 3|n is le 2|n is in [1, 3]|n is not in [1, 3]|n is sameas 3|nil is sameas none
undefd is defined|undefd is undefined|undefd.x is defined|n is defined and n is odd
range is callable|n is callable|undefd|undefd ~ 'x'|undefd | length|undefd | default('d')
empty | default('d')|empty | default('d', true)|empty | default('d', boolean=true)
nil | default('d')|undefd | d|name | upper|name | lower|'\u00e9\u00df\u0416\u03c9' | upper
'\u00c9\u0416\u03a9' | lower|'hello wORLD-foo (bar) [baz' | title|'hELLO wORLD' | capitalize
'  x ' | trim|'xxaxx' | trim('x')|'\u00a0 x\u3000' | trim|nil | trim|words | join
words | join(', ')|words | join(d='-')|items | join('+', attribute='k')
[1, none, true] | join('/')|undefd | join(',')|'abc' | join('-')|words | first|words | last
[] | first|[] | last|'abc' | first|words | list|'abc' | list|d | list|words | reverse | list
'abc' | reverse|words | sort|words | sort(reverse=true)|words | sort(case_sensitive=true)
items | sort(attribute='n') | length|[3, 1, 2] | sort|[3, 1, 2] | sort(true)
items[:2] | sort(attribute='n')|d | dictsort|d | dictsort(true)|d | dictsort(by='value')
d | dictsort(reverse=true)|'42' | int|' 42 ' | int|'4.7' | int|'x' | int|'x' | int(7)|4.9 | int
-4.9 | int|true | int|'1e3' | int|'1.5' | float|'x' | float|3 | float|'007' | int|n | string
nil | string|d | string|[1, 'a'] | string|'<b>' | safe|'aXbXc' | replace('X', '-')
'aXbXc' | replace('X', '-', 1)|'abc' | replace('', '.')|'aaa' | replace('aa', 'b')
'a\\nb\\n\\nc' | indent|'a\\nb\\n\\nc' | indent(2)|'a\\nb\\n\\nc' | indent(2, true)
'a\\nb\\n\\nc' | indent(2, first=true, blank=true)|'a\\nb' | indent('> ')
words | map('upper') | join(' ')|items | map(attribute='k') | list
items | map(attribute='n', default=9) | list|words | map('replace', 'p', 'P') | list
nested | map('length') | list|nested | map('first') | list
items | selectattr('n') | map(attribute='k') | list|items | selectattr('n', 'defined') | list
items | selectattr('n', 'equalto', 2) | list|items | rejectattr('n', 'defined') | list
items | rejectattr('k', 'in', ['x', 'y']) | list|items | selectattr('n', 'undefined') | list
[1, 2, 3, 4] | select('even') | list|[1, 2, 3] | reject('odd') | list
[0, 1, '', 'a', none] | select | list|[0, 1, ''] | reject | list
words | select('in', ['fig']) | list|messages | selectattr('role', '==', 'user') | list | length
messages | map(attribute='role') | join(',')
messages | selectattr('role', 'equalto', 'nobody') | list
(messages | selectattr('role', 'eq', 'x')) is iterable
'y' if messages | selectattr('role', 'eq', 'x') else 'n'|d | items | list|d.items() | list
d.keys() | list|d.values() | list|d.get('a')|d.get('q')|d.get('q', 5)|d.items is defined
d.nothing is defined|name.upper is defined|'a,b,,c'.split(',')|'a,b,c'.split(',', 1)
'a,b,c'.rsplit(',', 1)|' a  b '.split()|'a  b c'.split(none, 1)|' a b  c '.rsplit(none, 1)
'abc'.split('x')|''.split(',')|''.split()|'a<x>b<x>c'.split('<x>')[-1]|'  x '.strip()
'xxaxx'.strip('x')|'xyaxy'.strip('yx')|'  x '.lstrip()|'  x '.rstrip()|'\\n\\na\\n'.lstrip('\\n')
'aaa'.strip('a')|'hello'.startswith('he')|'hello'.startswith(('x', 'h'))|'hello'.endswith('lo')
'hello'.endswith(())|'hello'.find('l')|'hello'.rfind('l')|'hello'.find('z')|'h\u00e9llo'.find('l')
'hello'.index('e')|'hello'.count('l')|'aaaa'.count('aa')|'hello'.replace('l', 'L')
'hello'.replace('l', 'L', 1)|'aB'.capitalize()|'aB'.upper()|'aB'.lower()|', '.join(words)
''.join([])|'abc'.removeprefix('a')|'abc'.removeprefix('x')|'abc'.removesuffix('bc')
range(3) | list|range(1, 4) | list|range(10, 0, -3) | list|range(0) | list|range(5)[2]
range(3) | length|dict(a=1, b='x')|dict(d, z=1)|namespace(a=1).a|d | tojson|messages | tojson
messages[2] | tojson(indent=2)|messages[2] | tojson(indent=0)|'\u00e9<>&\\'"\\n\\u2028' | tojson
'\u00e9\U0001f600' | tojson(ensure_ascii=true)|d | tojson(sort_keys=true)
d | tojson(separators=(',', ':'))|[] | tojson|{} | tojson(indent=2)|[[], {}] | tojson(indent=1)
(1, 2) | tojson|none | tojson|true | tojson|1.0 | tojson|big | tojson
{'a': 1}.items() | list | tojson|{1: 2, none: 3, true: 4} | tojson|d | string|nested|tree
messages[2]|d.items() | list | string|1, 2|n,|strftime_now('%Y-%m-%d') is string|[n, [n]] | string
(n)|((n))|[1, 2,]|{'a': 1,}|words[n - 3]|words | length - 1|(words | length) // 2|words[:n] | last
not words is mapping|name is string and name is not none|'a' 'b' | upper|- 3 + 5|'%' ~ n
1 if 1 else 2 if 2 else 3|[] | sort | list|'a' is in ['a'] and true|n is odd or x.y
""".strip("\n")

TEMPLATES = [
    "{% if n == 1 %}a{% elif n == 3 %}b{% elif n == 3 %}c{% else %}d{% endif %}",
    "{% if no %}a{% elif empty %}b{% else %}d{% endif %}{% if no %}x{% endif %}.",
    "{% for w in words %}{{ loop.index }}/{{ loop.length }}{{ w }}{% if not loop.last %}, "
    "{% endif %}{% endfor %}",
    "{% for w in [] %}x{% else %}none{% endfor %}|{% for w in [1] %}x{% else %}none"
    "{% endfor %}",
    "{% for w in words if w != 'fig' %}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 "
    "}}{{ loop.first }}{{ loop.last }}{{ w }};{% else %}none{% endfor %}",
    "{% for w in words if w == 'x' %}{{ w }}{% else %}none{% endfor %}",
    "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}"
    "{% for k, v in d | items %}{{ k }}{% endfor %}",
    "{% for k, v in d | dictsort %}{{ k }}={{ v }};{% endfor %}"
    "{% for (a, b) in [(1, 2)] %}{{ a }}{{ b }}{% endfor %}",
    "{% for k in d %}{{ k }}{% endfor %}{% for c in 'h\u00e9' %}[{{ c }}]{% endfor %}",
    "{% for x in 1, 2, 3 %}{{ x }}{% endfor %}{% for x in undefd %}a{% else %}b{% endfor %}",
    "{% for a in [1, 2] %}{% for b in [3, 4] %}{{ a }}{{ b }}{{ loop.index }} "
    "{% endfor %}{{ loop.index }}\n{% endfor %}",
    "{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined else '-' }}>{{ "
    "loop.nextitem.role if not loop.last else '-' }} {% endfor %}",
    "{% for i in range(6) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 4 %}"
    "{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for i in range(3) %}{% for j in range(9) %}{% if j > i %}{% break %}"
    "{% endif %}{{ j }}{% endfor %}.{% else %}e{% endfor %}",
    "{% for i in range(4) %}{% set x %}a{% if i == 2 %}{% break %}{% endif %}b"
    "{% endset %}{{ x }}{% endfor %}!",
    "{% for t in tree recursive %}{{ t.v }}@{{ loop.depth }}{% if t.c %}({{ loop(t.c) }})"
    "{% endif %}{% endfor %}",
    "{% for t in tree if t.v > 0 recursive %}{{ loop.depth0 }}{{ t.v }}{{ loop(t.c) }};"
    "{% endfor %}",
    "{% for i in range(5) %}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{% set x = 1 %}{% for i in [1, 2] %}{% set x = x + i %}{{ x }}{% endfor %}{{ x }}",
    "{% set ns = namespace(x=1, y='a') %}{% for i in [1, 2] %}{% set ns.x = ns.x + i %}"
    "{% set ns.z = i %}{% endfor %}{{ ns.x }}{{ ns.z }}{{ ns.y }}{{ ns.q is defined }}",
    "{% set x %}{% set q = 1 %}{{ q }}{% endset %}{{ x }}{{ q is defined }}",
    "{% if yes %}{% set z = 5 %}{% endif %}{{ z }}", "{% set a, b = 1, 2 %}{{ a }}{{ b }}",
    "{% set a = 1, 2 %}{{ a }}", "{% set t = 'x' if no else 'y' %}{{ t }}",
    "{% set x %}  a {{ n }}\n{% endset %}[{{ x }}]{{ x | length }}",
    "{% set x | trim | upper %}  a {{ n }} {% endset %}[{{ x }}]",
    "{% macro f(a, b=2, c='x') %}{{ a }}{{ b }}{{ c }}"
    "{% endmacro %}{{ f(1) }}|{{ f(1, c=3) }}|{{ f(b=5, a=4) }}|{{ f() }}",
    "{% macro f(a, b=a) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(1, 2) }}",
    "{% macro fact(k) %}{% if k <= 1 %}1{% else %}{{ k }}*{{ fact(k - 1) }}{% endif %}"
    "{% endmacro %}{{ fact(5) }}",
    "{% macro show(t) %}{{ t.v }}{% for c in t.c %}<{{ show(c) }}>{% endfor %}"
    "{% endmacro %}{{ show(tree[0]) }}",
    "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}G{% endmacro %}{{ f() }}",
    "{% set y = 1 %}{% macro f() %}{{ y }}{% set y = 7 %}{{ y }}{% endmacro %}"
    "{% set y = 2 %}{{ f() }}{{ y }}",
    "{% macro f() %}  x  {% endmacro %}[{{ f() | trim }}][{{ f() | length }}]{{ f is callable"
    " }}",
    "{% macro box(t) %}[{{ t }}:{{ caller() }}]{% endmacro %}{% call box('q') %}in {{ n }}"
    "{% endcall %}",
    "{% macro each(l) %}{% for i in l %}{{ caller(i, loop.index) }}{% endfor %}"
    "{% endmacro %}{% call(v, i=0) each([5, 6]) %}{{ i }}:{{ v }} {% endcall %}",
    "{% macro f() %}{{ caller is defined }}{% endmacro %}{{ f() }}",
    "a\n{% if yes %}\nb\n{% endif %}\nc\n", "a\n  {% if yes %}  \nb\n  {% endif %}\nc",
    "  {{ n }}  \n  x", "a\n   {%- if yes -%}\n  b  {%- endif %}\n\n c", "a  {{- n -}}  b",
    "x {#- c -#} y", "x {# c #}\ny", "  {# c #}\ny", "a\n  {%+ if yes %}b{% endif %}",
    "a{% if yes +%}\nb{% endif %}", "a {#+ c +#}\nb", "{#- a -#}", "{#{{ n }}#}b", "{##}a",
    "{% raw %}{{ n }} {% if %}{% endraw %}.", "a\n  {% raw %}\n {{ x }}\n  {% endraw %}\nb",
    "a {%- raw -%}  {{ x }}  {%- endraw -%}  b", "line\r\nnext\rlast\r\n", "end\n\n",
    "{{ '{{' }}{{ '%}' }}{{ \"}}\" }}", "{{ {'a': {'b': 1}} }}", "{{{'a': 1}}}",
    "{{ n }}{{n}}{{-n}}{{ -n }}", "{% if n %}{%- endif -%}  x", "{%if n%}y{%endif%}",
    "{%- set x = 1 -%}\n\n{{ x }}\n", "{{\n n\n}}",
    "{% for i in [1,2] -%}\n  {{ i }}\n{%- endfor %}", "\n\n{% if yes %}x{% endif %}\n\n",
    "{%- for i in [1, 2] %}\n    {%- if i == 1 %}\n        {{- 'a' }}\n    "
    "{%- else %}\n        {{- 'b\\n' }}\n    {%- endif %}\n{%- endfor %}",
    "{% generation %}abc{{ n }}{% endgeneration %}d",
    "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}",
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message.content is string %}{{ message.content | trim }}"
    "{% elif message.content %}{% for p in message.content %}{{ p.text }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% for a in words %}{% set outer = loop %}"
    "{% for b in [1] %}{{ outer.index }}{{ loop.index }}{% endfor %}{% endfor %}",
    "{{ undefd }}{{ d.x }}{{ words[9] }}{{ nil }}", "{{ 'a' }}\n{{ 'b' }}\n", "{{ bos_token }}x",
    "\u00e9\u4e2d{{ '\u00e9' }}",
    "{% set x = {'a': [1, 2]} %}{{ x.a[1] }}{{ x['a'][0] }}{{ x.a.b is defined }}",
    "{% if words[5:] %}a{% else %}b{% endif %}",
    "{% if 'a' in words and 'fig' in words or n > 2 and not no %}1{% endif %}",
    "{% for i in range(3) %}{{ i }}{% if loop.first %}F{% endif %}{% endfor %}",
    "{% set m = messages | selectattr('role', 'equalto', 'user') | list %}{{ m | length }}{{ "
    "(m | first).content }}",
    "{{ messages[1].content | tojson | safe }}",
    "{% set x = (words | map('length') | list) %}{{ x }}",
    "{%- macro a(x) -%} {{- x -}} {%- endmacro -%} {{ a(1) ~ a(2) }}",
    "{% if x is not defined %}{% set x = 4 %}{% endif %}{{ x }}",
]

ERRORS = [
    "{{ undefd.x }}", "{{ undefd[0] }}", "{{ undefd + 1 }}", "{{ 'a' + 1 }}", "{{ 1 + 'a' }}",
    "{{ [1] + (2,) }}", "{{ none.x.y }}", "{{ undefd() }}", "{{ d.x.y }}",
    "{{ raise_exception('no: ' + name) }}", "{{ 1 / 0 }}", "{{ 1 % 0 }}", "{{ 1 < 'a' }}",
    "{{ none < 1 }}", "{{ n.upper() }}", "{{ nil.strip() }}",
    "{{ messages[2].content.startswith('a') }}", "{{ 1 in 'a' }}", "{{ 1 in 1 }}",
    "{% for x in 5 %}{% endfor %}", "{% for x in none %}{% endfor %}",
    "{% for a, b in [1] %}{% endfor %}", "{% for a, b in [(1, 2, 3)] %}{% endfor %}",
    "{% set a, b = 1 %}", "{{ undefd | tojson }}", "{{ 'a,b'.split('') }}", "{{ 5 | length }}",
    "{{ [1, 'a'] | sort }}", "{{ n() }}", "{{ {[1]: 2} }}", "{{ 'a' * 'b' }}", "{% set n.x = 1 %}",
    "{{ ', '.join([1]) }}", "{{ 'x'.index('y') }}",
    "{{ messages | map(attribute='content') | join('') | nofilter }}", "{{ n", "{% if n %}",
    "{% endif %}", "{% for %}", "{{ n | }}", "{{ (1 }}", "{{ [1 }}", "{{ 'a }}",
    "{% if %}{% endif %}", "{{ 1 2 }}", "{{ }}", "{# x", "{% else %}", "{% elif n %}", "{% set %}",
    "{% macro %}{% endmacro %}", "{% nosuch %}", "{{ n is nosuch }}", "{% break %}", "{{ a.b. }}",
    "{{ not }}", "{% set true = 1 %}", "{% for x in [1] %}{% endif %}", "{{ '\\", "{{ n ! }}",
    "{{ $ }}", "{{ f(a=1, 2) }}", "{% call n %}{% endcall %}",
    "{% if yes %}{% else %}{% else %}{% endif %}", "{{ d | dictsort(nosuch=1) }}", "{% endfor %}",
    "{{ 'a' is divisibleby 2 }}", "{% macro f(a) %}{% endmacro %}{{ f(1, 2) }}",
    "{% macro f(a) %}{% endmacro %}{{ f(b=2) }}", "{{ 'x'[::0] }}", "{{ range(1, 5, 0) }}",
    "{{ namespace(1) }}",
]


def render(template, context):
    try:
        return {"prompt": _compile_jinja_template(template).render(**context)}
    except Exception as e:                                           # Jinja, Python: any refusal
        return {"error": "%s: %s" % (type(e).__name__, e)}


def main():
    cases = []
    for expression in re.split(r"(?<! )\|(?! )|\n", EXPRESSIONS):
        cases.append("{{ %s }}" % expression)
    cases += TEMPLATES + ERRORS
    context = dict(CONTEXT, add_generation_prompt=True, documents=None)
    out = [dict({"template": t}, **render(t, context)) for t in cases]
    print('{"context": %s,\n"cases": [' % json.dumps(CONTEXT))
    print(",\n".join(json.dumps(c) for c in out))
    print("]}")


if __name__ == "__main__":
    main()
