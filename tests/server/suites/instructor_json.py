"""instructor, which asks for an object of a class: by JSON schema, since tools are refused."""

import os

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


def test_an_object_of_a_class():
    client = instructor.from_openai(
        OpenAI(base_url=os.environ["SERVED"] + "/v1", api_key="none", max_retries=0),
        mode=instructor.Mode.JSON_SCHEMA,
    )
    person = client.chat.completions.create(
        model="demo", response_model=Person, max_retries=0,
        messages=[{"role": "user", "content": "Ada is 36."}],
    )  # fmt: skip
    assert isinstance(person, Person)
