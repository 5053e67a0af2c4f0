"""JSON answers against schemas; the oracle of a schema's meaning is the package jsonschema itself."""

import builtins
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from rlaif_jax.config import UserError, from_json, to_json
from rlaif_jax.feedback.verifiers.json_schema import JsonSchema

pytest.importorskip("jsonschema", reason="JSON schemas need the extra: pip install -e '.[verifiers]'")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.fixture
def of_file(tmp_path):
    def of_file(schema):
        (tmp_path / "schema.json").write_text(schema if isinstance(schema, str) else json.dumps(schema))
        return JsonSchema(tmp_path / "schema.json").build()

    return of_file


@pytest.mark.parametrize(
    "answer, right",
    [
        ('{"name": "Ann", "age": 3}', True),
        ('\n {"name": "Ann"} \n', True),
        ('Here it is:\n```json\n{"name": "Ann"}\n```\nGood luck!', True),
        ('```JSON\n{"name": "Ann"}\n```', True),
        ('```\n{"name": "Ann"}\n```', True),
        ('```python\nx = {}\n```\n```json\n{"name": "Ann"}\n```', True),
        ('```json\n{"age": 3}\n```\n```json\n{"name": "Ann"}\n```', False),
        ('```python\n{"name": "Ann"}\n```', False),
        ('```json\n{"name": "Ann"}', False),
        ('{"name": "Ann", "age": -1}', False),
        ('{"name": "Ann", "age": "3"}', False),
        ('{"name": "Ann", "size": 3}', False),
        ('{"age": 3}', False),
        ('["Ann"]', False),
        ('{"name": "Ann",}', False),
        ("{'name': 'Ann'}", False),
        ('It is {"name": "Ann"}', False),
        ('{"name": "Ann", "age": NaN}', False),
        ("", False),
        ("[" * 100000, False),
        ("9" * 100000, False),
    ],
)
def test_answers(of_file, answer, right):
    feedback = of_file(SCHEMA)([{}], [answer])
    assert feedback.valid.all() and feedback.values.item() == right
    source = JsonSchema(field="schema").build()
    assert source([{"schema": SCHEMA}, {"schema": json.dumps(SCHEMA)}], [answer] * 2).values.tolist() == [[right]] * 2


def test_numbers_beyond_those_of_a_computer_are_wrong(of_file):
    source = of_file({"properties": {"a": {"multipleOf": 0.01}}})
    answers = ['{"a": 1e999}', f'{{"a": {"9" * 330}}}', '{"a": 2}']
    judged = source([{}] * 3, answers)
    assert judged.valid.all() and judged.values[:, 0].tolist() == [0, 0, 1]


def test_values_nested_more_deeply_than_python_can_check(of_file):
    source = of_file({"$defs": {"n": {"items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"})
    assert source([{}] * 2, ["[" * 900 + "]" * 900, "[[]]"]).values[:, 0].tolist() == [0, 1]


def test_a_pattern_whose_search_would_not_end(of_file):
    source = of_file({"properties": {"x": {"pattern": r"^(a|aa)+$"}}})
    answers = ['{"x": "aaa"}', '{"x": "b"}', '{"x": 3}', json.dumps({"x": "a" * 90 + "b"})]
    feedback = source([{}] * 4, answers)
    assert feedback.values[:, 0].tolist() == [1, 0, 1, 0] and feedback.valid[:, 0].tolist() == [True, True, True, False]
    assert source.missing() == {"the search of a pattern of the schema took more than 1 s": 1}


def test_the_draft_that_a_schema_names_counts(of_file):
    """Of "exclusiveMinimum": true draft 4 makes a bound; the latest draft knows numbers alone."""
    old = {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 3, "exclusiveMinimum": True}
    assert of_file(old)([{}] * 2, ["3", "4"]).values[:, 0].tolist() == [0, 1]


def test_records_without_a_schema():
    source = JsonSchema(field="schema").build()
    records = [{}, {"schema": "{"}, {"schema": {"type": "text"}}, {"schema": [1]}, {"schema": {"$ref": "http://x.y/z"}}]
    records.append({"schema": {"const": {1, 2}}})
    assert not source(records, ["{}"] * 6).valid.any()
    reasons = list(source.missing())
    assert reasons[0] == "the record has no 'schema'" and reasons[4].endswith("has a reference that it cannot resolve")
    assert "is no JSON schema: Expecting property name" in reasons[1]
    assert "is no JSON schema: $.type: 'text' is not valid" in reasons[2]
    assert "is no JSON schema: it is a list, not an object" in reasons[3]
    assert "is no JSON schema: Object of type set is not JSON serializable" in reasons[5]


@pytest.mark.parametrize(
    "schema, words",
    [
        ("{", "schema.json: no JSON schema: Expecting"),
        ({"type": "text"}, r"schema.json: no JSON schema: \$.type: 'text' is not valid"),
        ("[]", "schema.json: no JSON schema: it is a list, not an object"),
        ({"pattern": "("}, r"schema.json: no JSON schema: \$.pattern: '\(' is not a 'regex'"),
    ],
)
def test_files_that_are_no_schema(of_file, schema, words):
    with pytest.raises(UserError, match=words):
        of_file(schema)


def test_the_numbers_that_json_does_not_have(of_file):
    answers = ["NaN", "[Infinity]", "-Infinity", "1e999", "1"]
    assert of_file("true")([{}] * 5, answers).values[:, 0].tolist() == [0, 0, 0, 1, 1]


def test_references_that_lead_nowhere(of_file):
    with pytest.raises(
        UserError, match=r"schema.json: the schema has a reference that it cannot resolve: PointerToNowh"
    ):
        of_file({"$ref": "#/$defs/x"})([{}], ["{}"])


def test_a_reference_is_never_fetched(of_file):
    fetched = []

    class Schemas(BaseHTTPRequestHandler):
        def do_GET(self):
            fetched.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *unused):
            return

    with HTTPServer(("127.0.0.1", 0), Schemas) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            source = of_file({"$ref": f"http://127.0.0.1:{server.server_port}/schema"})
            with pytest.raises(UserError, match=r"has a reference that it cannot resolve: Unresolvable: http://127"):
                source([{}], ["{}"])
        finally:
            server.shutdown()
            thread.join()
    assert fetched == []


def test_settings_that_are_not_right(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="either a schema or a field"):
        JsonSchema()
    with pytest.raises(UserError, match="either a schema or a field"):
        JsonSchema(tmp_path, "field")
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.json"):
        JsonSchema(tmp_path / "nowhere.json").build()
    real = builtins.__import__

    def without(name, *rest):
        if name == "jsonschema":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs the package jsonschema: pip install -e '\.\[verifiers\]' in"):
        JsonSchema(field="x").build()


def test_settings_as_json(tmp_path):
    for config in (JsonSchema(tmp_path / "a.json"), JsonSchema(field="schema")):
        assert from_json(JsonSchema, to_json(config)) == config
