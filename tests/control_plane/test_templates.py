"""Stored templates: versions, typed variables, what is made of them, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.control_plane.support import Agent, Answer, Operator

VARIABLES: list[dict[str, Any]] = [
    {"name": "model", "type": "select", "required": True, "options": ["resnet50", "vgg16", "bert"]},
    {"name": "epochs", "type": "int", "default": 100},
    {"name": "resume", "type": "bool", "default": False},
    {"name": "note", "default": ""},
]
TASK: dict[str, Any] = {
    "name": "train {{model}}",
    "command": "python",
    "args": ["train.py", "--model={{ vars.model }}", "--epochs", "{{epochs}}", "--resume={{resume}}"],
    "env": {"NOTE": "{{ note }}"},
    "timeout": "24h",
}


async def store(operator: Operator, name: str = "train", **body: Any) -> Answer:
    """Store a template; the one for training unless something else is said."""
    subject = {} if "group" in body else {"task": TASK}
    return await operator.call("POST", "/templates", json={"name": name, "variables": VARIABLES} | subject | body)


async def instantiate(operator: Operator, *, name: str = "train", more: Any = None, **variables: Any) -> Answer:
    """Make something of a template."""
    body = {"variables": variables} | (more or {})
    return await operator.call("POST", f"/templates/{name}/instantiate", json=body)


async def test_task_of_a_template(agent: Agent, operator: Operator) -> None:
    """Values and defaults stand in single arguments, environment and name, as the agent gets them."""
    await store(operator)
    answer = await instantiate(operator, model="bert", note="two words; $HOME")
    task = await agent.claim_one()
    assert answer.data == {"template": "train", "version": 1, "task_ids": [task["id"]]}
    assert task["args"] == ["train.py", "--model=bert", "--epochs", "100", "--resume=false"]
    assert (task["name"], task["env"]) == ("train bert", {"NOTE": "two words; $HOME"})


async def test_values_are_not_read_again(agent: Agent, operator: Operator) -> None:
    """What looks like a variable in a value stays as it is."""
    await store(operator)
    await instantiate(operator, model="bert", note="{{epochs}}")
    assert (await agent.claim_one())["env"] == {"NOTE": "{{epochs}}"}


@pytest.mark.parametrize(
    ("variables", "argument"),
    [
        ({"epochs": 7}, "7"),
        ({"epochs": "007"}, "7"),
        ({"epochs": -1}, "-1"),
        ({"epochs": None}, "100"),
        ({"resume": True}, "--resume=true"),
        ({"resume": "true"}, "--resume=true"),
    ],
)
async def test_typed_values(agent: Agent, operator: Operator, variables: dict[str, Any], argument: str) -> None:
    """Numbers and booleans may be written as text; null is the default."""
    await store(operator)
    await instantiate(operator, model="bert", **variables)
    assert argument in (await agent.claim_one())["args"]


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, "variable 'model' is required"),
        ({"model": "brt"}, "variable 'model' must be one of resnet50, vgg16, bert, not the text 'brt'; did you mean"),
        ({"model": 7}, "variable 'model' must be one of resnet50, vgg16, bert, not the number 7"),
        ({"model": "bert", "epochs": "many"}, "variable 'epochs' must be a whole number, not the text 'many'"),
        ({"model": "bert", "epochs": 1.5}, "variable 'epochs' must be a whole number, not the number 1.5"),
        ({"model": "bert", "epochs": True}, "variable 'epochs' must be a whole number, not true"),
        ({"model": "bert", "resume": 1}, "variable 'resume' must be true or false, not the number 1"),
        ({"model": "bert", "note": 1}, "variable 'note' must be text, not the number 1"),
        ({"model": "bert", "note": "a\0b"}, "variable 'note' must not contain a NUL character"),
        ({"model": "bert", "note": "x" * 9000}, "variable 'note' is 9000 characters long"),
        ({"model": "bert", "epoch": 1}, "variable 'epoch' is none of this template's; did you mean 'epochs'?"),
    ],
)
async def test_bad_values(operator: Operator, variables: dict[str, Any], named: str) -> None:
    """30005 with the variable's name, and nothing is submitted."""
    await store(operator)
    answer = await instantiate(operator, **variables)
    assert answer.code == 30005
    assert named in answer.message
    assert (await operator.call("GET", "/tasks")).data["total"] == 0


async def test_all_bad_values_are_named(operator: Operator) -> None:
    """In one answer."""
    await store(operator)
    answer = await instantiate(operator, epochs="x", resume="y")
    assert [name in answer.message for name in ("'model'", "'epochs'", "'resume'")] == [True] * 3


async def test_value_that_the_task_cannot_have(operator: Operator) -> None:
    """A name becomes too long by one variable: that one is named."""
    variables = [{"name": "a", "default": "x"}, {"name": "b", "default": "y"}]
    await store(operator, variables=variables, task={"name": "{{a}}{{b}}", "command": "true"})
    answer = await instantiate(operator, a="z", b="long" * 100)
    assert answer.message.startswith("variable 'b': tasks[0]: ")


async def test_versions(agent: Agent, operator: Operator) -> None:
    """Storing a name again makes the next version; the older ones stay as they were."""
    assert (await store(operator)).data == {"name": "train", "version": 1}
    assert (await store(operator, task=TASK | {"name": "second"})).data["version"] == 2
    await instantiate(operator, model="bert")
    assert (await agent.claim_one())["name"] == "second"
    await instantiate(operator, model="bert", more={"version": 1})
    assert (await agent.claim_one())["name"] == "train bert"
    shown = (await operator.call("GET", "/templates/train?version=1")).data
    assert (shown["task"], shown["version"], shown["versions"]) == (TASK, 1, [1, 2])
    assert (await instantiate(operator, model="bert", more={"version": 3})).code == 30004


async def test_listing_and_removal(operator: Operator) -> None:
    """The newest version of each name; removed names begin again."""
    for name in ("b", "a", "a"):
        await store(operator, name)
    page = (await operator.call("GET", "/templates?limit=1")).data
    assert (page["total"], page["templates"][0]["name"], page["templates"][0]["version"]) == (2, "a", 2)
    assert (await operator.call("DELETE", "/templates/a")).data == {"name": "a", "removed_versions": 2}
    assert (await operator.call("DELETE", "/templates/a")).code == 30004
    assert (await operator.call("GET", "/templates/a")).code == 30004
    assert (await store(operator, "a")).data["version"] == 1


async def test_group_of_a_template(agent: Agent, operator: Operator) -> None:
    """Variables stand in all of its tasks, and in their defaults."""
    group = {
        "mode": "serial",
        "defaults": {"env": {"MODEL": "{{model}}"}},
        "tasks": [{"command": "true"}, {"id": "eval", "command": "eval", "args": ["--epochs={{epochs}}"]}],
    }
    await store(operator, group=group)
    made = (await instantiate(operator, model="vgg16", more={"id": "night"})).data
    assert (made["group_id"], made["task_ids"]["eval"]) == ("night", "night.eval")
    first = await agent.claim_one()
    assert first["env"] == {"MODEL": "vgg16"}
    await agent.complete(first)
    assert (await agent.claim_one())["args"] == ["--epochs=100"]


async def test_instances_have_a_destination(agent: Agent, operator: Operator) -> None:
    """A template is broadcast as any task is."""
    await operator.enrol("machine-2")
    await store(operator)
    made = await instantiate(operator, model="bert", more={"id": "t", "to": {"mode": "broadcast"}})
    assert made.data["task_ids"] == ["t.machine-1", "t.machine-2"]
    assert (await agent.claim_one())["id"] == "t.machine-1"


async def test_audit_names_the_template(operator: Operator) -> None:
    """Stored, used and removed."""
    await store(operator)
    [task_id] = (await instantiate(operator, model="bert")).data["task_ids"]
    await operator.call("DELETE", "/templates/train")
    entries = (await operator.call("GET", "/audit")).data["entries"]
    assert [(entry["action"], entry["subject"]) for entry in entries] == [
        ("template.remove", "train"),
        ("task.submit", task_id),
        ("template.store", "train"),
    ]
    assert entries[1]["detail"].endswith("template train version 1")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"task": TASK | {"args": ["{{modell}}"]}}, "task.args[0]: {{modell}} is no variable of this template"),
        ({"task": {"command": "python {{model}}"}}, "task.command: {{model}} cannot stand here"),
        ({"task": {"script": "echo {{model}}"}}, "task.script: {{model}} cannot stand here"),
        ({"task": TASK | {"timeout": "{{epochs}}"}}, "task.timeout: {{epochs}} cannot stand here"),
        ({"task": {"command": "a", "tiemout": 5}}, "task: unknown key 'tiemout'; did you mean 'timeout'?"),
        ({"task": {"command": "a", "id": "always-the-same"}}, "task: unknown key 'id'"),
        ({"task": {"name": "x"}}, "a task needs a command or a script"),
        ({"task": None}, "a template has either a task or a group"),
        ({"group": {"tasks": [{"command": "a", "depends_on": ["b"]}]}}, "there is no task b in this group"),
        ({"group": {"id": "g", "tasks": [{"command": "a"}]}}, "group.id: "),
        ({"name": "a/b"}, "name: "),
        ({"variables": [{"name": "a b"}]}, "variables.0.name: "),
        ({"variables": [{"name": "a"}]}, "variable 'a' is neither required nor has a default"),
        ({"variables": [{"name": "a", "required": True, "default": "x"}]}, "variable 'a' is required with a default"),
        ({"variables": [{"name": "a", "type": "int", "default": "x"}]}, "variable 'a': default: must be a whole"),
        ({"variables": [{"name": "a", "type": "select", "required": True}]}, "variable 'a': options belong to"),
        ({"variables": [{"name": "a", "default": ""}] * 2}, "variable 'a' stands there twice"),
        ({"variables": [{"name": "a", "type": "float", "default": "1"}]}, "variables.0.type: "),
    ],
)  # fmt: skip
async def test_bad_template(operator: Operator, body: dict[str, Any], named: str) -> None:
    """30005 with the variable or the place, and nothing is stored."""
    answer = await store(operator, **body)
    assert answer.code == 30005
    assert named in answer.message
    assert (await operator.call("GET", "/templates")).data["total"] == 0
