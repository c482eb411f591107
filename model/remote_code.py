"""The one Python file that lets plain transformers run an exported model under its length config.

It is cut from this package's own modules: the definitions that `ShortenedNetwork` and one family's adapter need, and
nothing else. So there is one implementation, and the file imports only torch, numpy and transformers.
"""

import ast
import importlib
import inspect
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import ModelOutput

from model.families import EncoderFamily
from model.graph import GraphPlan, graph_logits
from model.length_config import LengthConfig

MODULE = "length_adaptive"
"""The file's name, less its ending."""
LENGTH_CONFIG = "length_config"
"""Where config.json says which length config the file runs under."""
SOURCES = ("length_config", "macs", "attention", "families", "graph", "remote_code")
"""Modules that the file is cut from, those that are built on first."""


class ShortenedNetwork:
    """A transformers network that drops tokens as its config's `length_config` says; to be put before its class.

    It predicts only: the weights are those of the plain network, which is what is trained.
    """

    family: ClassVar[EncoderFamily]
    task: ClassVar[str]
    config: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **_unused: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Logits as the plain class names them.

        Args:
            input_ids: int64 (B, L); padding, if any, on the right.
            attention_mask: (B, L), 1 at real tokens; None where all are real.
            token_type_ids: (B, L) or None.
            labels: Must be None.
            return_dict: False gives a tuple.
        Raises:
            ValueError: No token ids, labels, or padding on the left.
        """
        if input_ids is None or labels is not None:
            raise ValueError("This class predicts from input_ids; load it without trust_remote_code to train.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if not bool(attention_mask[:, 0].all()):
            raise ValueError("A sequence starts with padding; pad on the right, so that [CLS] comes first.")
        plan = GraphPlan.of(LengthConfig.from_json(json.dumps(self.config.length_config)), input_ids.size(1))
        reads_first = self.task in ("classification", "regression")
        left_NM = plan.left_NM.to(input_ids.device)
        logits = graph_logits(self.family, self, plan, reads_first, input_ids, attention_mask, token_type_ids, left_NM)
        output: ModelOutput
        if self.task == "question-answering":
            output = QuestionAnsweringModelOutput(start_logits=logits[..., 0], end_logits=logits[..., 1])
        elif reads_first:
            output = SequenceClassifierOutput(logits=logits)
        else:
            output = TokenClassifierOutput(logits=logits)
        return output.to_tuple() if return_dict is False else output


def standalone_source(network: PreTrainedModel, family: EncoderFamily, task: str) -> tuple[str, str]:
    """The file for a network, and the name of its class.

    Args:
        network: Of one of transformers' own classes.
        family: Its adapter.
        task: What its head predicts.
    """
    base, adapter = type(network).__name__, type(family).__name__
    parts = _Parts.of(SOURCES)
    kept = parts.needed_by({ShortenedNetwork.__name__, adapter})
    imports = {*parts.imports_of(kept), f"from transformers import {base}"}
    name = f"LengthAdaptive{base}"
    lines = [
        '"""Runs this folder\'s model under the length config that its config.json names.',
        "",
        "Written by `hpo export` from the sources of hpo (Apache-2.0); load it with `trust_remote_code=True`.",
        "",
        "Shape letters: B sequences, L tokens arriving, K tokens handed on, D hidden size, H heads, d size of a head,",
        "Q tokens that ask, R rows (any leading dimensions of tokens), P what `project` makes of a token, M layers, N",
        "lengths from 0 up, C classes.",
        '"""',
        "",
        *sorted(imports, key=lambda line: (line.startswith("from"), line)),
        "",
        *(f"\n{parts.text[definition]}\n" for definition in kept),
        "",
        f"class {name}({ShortenedNetwork.__name__}, {base}):",
        f'    """{base} with fewer and fewer tokens."""',
        "",
        f"    family = {adapter}()",
        f"    task = {task!r}",
        "",
    ]
    return "\n".join(lines), name


@dataclass(frozen=True)
class _Parts:
    """The top-level definitions of some modules.

    Attributes:
        text: Source of each, by the names it defines, in order.
        uses: Names that each mentions.
        imports: The statement that brings a name in from elsewhere.
    """

    text: dict[str, str]
    uses: dict[str, set[str]]
    imports: dict[str, str]

    @classmethod
    def of(cls, modules: tuple[str, ...]) -> "_Parts":
        parts = cls({}, {}, {})
        for module in modules:
            source = inspect.getsource(importlib.import_module(f"model.{module}"))
            lines, statements = source.splitlines(), ast.parse(source).body
            for number, statement in enumerate(statements):
                if isinstance(statement, ast.Import | ast.ImportFrom):
                    parts._add_import(statement)
                    continue
                end = statement.end_lineno
                if _is_text(statements[number + 1 : number + 2]):  # says what a constant is
                    end = statements[number + 1].end_lineno
                for name in _defined(statement):
                    if name in parts.text:
                        raise AssertionError(f"{name} is defined in two of {modules}")
                    parts.text[name] = "\n".join(lines[_first_line(statement) - 1 : end])
                    parts.uses[name] = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        return parts

    def needed_by(self, roots: set[str]) -> list[str]:
        """The definitions that some need, themselves included, in order."""
        needed: set[str] = set()
        open_names = set(roots)
        while open_names:
            name = open_names.pop()
            needed.add(name)
            open_names |= self.uses[name] & self.text.keys() - needed
        return [name for name in self.text if name in needed]

    def imports_of(self, definitions: list[str]) -> set[str]:
        """The statements that bring in what these mention."""
        used = set().union(*(self.uses[name] for name in definitions))
        return {statement for name, statement in self.imports.items() if name in used}

    def _add_import(self, statement: ast.Import | ast.ImportFrom) -> None:
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").split(".")[0] == "model":
            return
        for alias in statement.names:
            one: ast.stmt
            if isinstance(statement, ast.ImportFrom):
                one = ast.ImportFrom(module=statement.module, names=[alias], level=0)
            else:
                one = ast.Import(names=[alias])
            self.imports[(alias.asname or alias.name).split(".")[0]] = ast.unparse(one)


def _defined(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _first_line(statement: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(decorator.lineno for decorator in decorators)])


def _is_text(statements: list[ast.stmt]) -> bool:
    return any(isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant) for one in statements)
