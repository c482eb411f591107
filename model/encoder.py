"""The length-adaptive encoder: a transformers network whose layers pass on only the tokens they attend to most.

Shape letters: B sequences, L tokens arriving, K tokens kept, D hidden size.
"""

import hashlib
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from model.attention import TOKEN_SCORES, token_score
from model.encoded import IGNORED
from model.families import FAMILIES, TOKEN_TASKS, attend
from model.front_file import FRONT_FILE, ServedFront
from model.hub import only_local_files
from model.length_config import LengthConfig
from model.macs import EncoderShape, sequence_macs
from model.shards import share_of

logger = logging.getLogger(__name__)

HEADS: Mapping[str, Any] = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "token-classification": AutoModelForTokenClassification,
}
"""What transformers calls the head of each task."""
TASKS = tuple(HEADS)
MULTI_LABEL = "multi_label_classification"
"""The `problem_type` of a config whose classes do not exclude each other, as transformers writes it."""
REGRESSION = "regression"
"""That of a number; without it transformers' own pipeline takes the head's output for a class's logit."""
LAYER_DROP = "layer_drop"
"""Where a config records it."""
EXPORT_FIELDS = frozenset({"auto_map", "length_config"})
"""Of the config.json of an export, what tells plain transformers about its length config."""
LAYER = re.compile(r"\.layers?\.\d+\.")
"""In the names of a layer's weights."""


class CheckpointError(ValueError):
    """A model folder or hub id that cannot be loaded as a length-adaptive encoder; the message says why."""


class LengthAdaptiveModel(nn.Module):
    """A transformers encoder that runs under any `LengthConfig`.

    The wrapped network stays an ordinary transformers model: `network` can be used, saved and loaded without
    this class. A call leaves nothing to reset: the config is an argument, never a setting.

    Attributes:
        network: The transformers model that holds the weights.
        task: What the head predicts.
        shape: The sizes that decide the cost.
        front: Where the folder it was loaded from is an export, the length configs that serve it; else None.
        has_new_head: Whether the folder it was loaded from had no head for the task, or not all of it.
    """

    def __init__(self, network: PreTrainedModel, task: str = "classification") -> None:
        super().__init__()
        model_type = str(network.config.model_type)
        if model_type not in FAMILIES:
            raise CheckpointError(f"Encoders of type {model_type!r} are not supported; use one of {sorted(FAMILIES)}.")
        check_task(task)
        self.network = network
        self.task = task
        self.front: ServedFront | None = None
        self.has_new_head = False
        self.family = FAMILIES[model_type]
        if refusal := self.family.refusal(network.config, task):
            raise CheckpointError(f"The {model_type} encoder {refusal}.")
        self.shape: EncoderShape = self.family.shape(network.config, task)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_id: str | Path,
        task: str | None = None,
        num_labels: int | None = None,
        label_names: Collection[str] | None = None,
        multi_label: bool | None = None,
    ) -> "LengthAdaptiveModel":
        """Load a transformers folder or hub id in float32; a missing task head is initialised anew.

        Args:
            folder_or_id: Folder that `save_pretrained` wrote (ours or transformers'), or a hub id.
            task: What the head predicts; None takes an export's own task, and classification of any other folder.
            num_labels: Classes; None takes the checkpoint's.
            label_names: Names of the classes, in order of their ids.
            multi_label: Whether any number of classes may apply to a text; None takes the checkpoint's word.
        Raises:
            CheckpointError: There is no such model, its weights are damaged or of another architecture.
            ExportError: It is an export of a later version of this tool.
            ValueError: Unknown task.
        """
        front = ServedFront.read(folder_or_id) if (Path(folder_or_id) / FRONT_FILE).is_file() else None
        task = task or (front.task if front else "classification")
        check_task(task)
        num_labels = {"regression": 1, "question-answering": 2}.get(task, num_labels)
        labels: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
        if label_names is not None:
            labels["id2label"] = dict(enumerate(label_names))
            labels["label2id"] = {name: index for index, name in enumerate(label_names)}
        if task == "classification" and multi_label is not None:
            labels["problem_type"] = MULTI_LABEL if multi_label else "single_label_classification"
        if task == "regression":
            labels["problem_type"] = REGRESSION
        config = read_config(folder_or_id, **labels)
        if front is not None:  # what plain transformers is told; a checkpoint saved from here is no export
            for name in EXPORT_FIELDS & vars(config).keys():
                delattr(config, name)
        try:
            network, report = HEADS[task].from_pretrained(
                folder_or_id,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=only_local_files(folder_or_id),
                ignore_mismatched_sizes=True,  # refused below, with a message that names the weight
            )
        except Exception as error:  # the library raises whatever its parsers do
            raise CheckpointError(explain_load_failure(folder_or_id, error)) from error
        model = cls(network, task)
        model.front = front if front is not None and front.task == task else None
        if model.front is not None and model.front.full.length_config.num_layers != model.num_layers:
            raise CheckpointError(
                f"{folder_or_id} holds an encoder of {model.num_layers} layers and a {FRONT_FILE} of another; export "
                "the model again."
            )
        model.has_new_head = not all(map(model._is_encoder_weight, report["missing_keys"]))
        if absent := sorted(key for key in report["missing_keys"] if model._is_encoder_weight(key)):
            raise CheckpointError(
                f"{folder_or_id} lacks {len(absent)} of the encoder's weights (first: {absent[0]}); "
                "it is damaged or holds another architecture. Use a complete checkpoint."
            )
        if surplus := sorted(
            key for key in report["unexpected_keys"] if model._is_encoder_weight(key) and LAYER.search(key)
        ):
            raise CheckpointError(
                f"{folder_or_id} holds weights that its config.json knows nothing of (first: {surplus[0]}); "
                f"is num_hidden_layers={model.num_layers} right?"
            )
        for name, stored, expected in sorted(report["mismatched_keys"]):
            if name.startswith(("classifier.", "qa_outputs.")):
                raise CheckpointError(
                    f"{folder_or_id} classifies into {stored[0]} classes, not {expected[0]}; "
                    "give a checkpoint with a fitting head or with none."
                )
            raise CheckpointError(
                f"{folder_or_id}: the weight {name} has the shape {tuple(stored)}, but config.json "
                f"says {tuple(expected)}; fetch or save the model again."
            )
        return model

    @property
    def num_layers(self) -> int:
        """Transformer layers."""
        return self.shape.num_layers

    @property
    def token_score(self) -> str:
        """What tokens are ranked by, one of `model.attention.TOKEN_SCORES`; saved with the checkpoint's config."""
        return token_score(self.network.config)

    @token_score.setter
    def token_score(self, name: str) -> None:
        if name not in TOKEN_SCORES:
            raise ValueError(f"token_score={name!r}; choose one of {', '.join(TOKEN_SCORES)}.")
        self.network.config.token_score = name

    @property
    def layer_drop(self) -> float:
        """The LayerDrop that the encoder was last trained with, as far as its config records one."""
        return float(getattr(self.network.config, LAYER_DROP, 0.0))

    @layer_drop.setter
    def layer_drop(self, probability: float) -> None:
        setattr(self.network.config, LAYER_DROP, probability)

    @property
    def reads_first(self) -> bool:
        """Whether the head reads the first token alone, so that no result depends on what the last layer keeps."""
        return self.task not in TOKEN_TASKS

    @property
    def is_multi_label(self) -> bool:
        """Whether any number of classes may apply to a text."""
        return self.task == "classification" and self.network.config.problem_type == MULTI_LABEL

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes or tags, in order of their ids.

        Raises:
            CheckpointError: Ids are left out.
        """
        numbers = sorted(map(int, self.network.config.id2label or {}))
        if numbers != list(range(len(numbers))):
            raise CheckpointError(
                f"The encoder's labels are numbered {numbers}; number them from 0 in its config.json."
            )
        return labels_of(self.network.config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def macs(self, num_tokens: int, length_config: LengthConfig | None = None) -> int:
        """Exact multiply-accumulates of one sequence of `num_tokens` real tokens, head included (see `model.macs`)."""
        return int(sequence_macs(self.shape, [num_tokens], length_config)[0])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        length_config: LengthConfig | None = None,
    ) -> SequenceClassifierOutput:
        """Run a batch, dropping tokens between the two halves of each layer as `length_config` says.

        Heads that read every token get those dropped too, each with the vector that it entered its last layer with.

        Args:
            input_ids: int64 (B, L); padding, if any, on the right.
            attention_mask: (B, L), 1 at real tokens; None where all are real.
            token_type_ids: (B, L) or None.
            labels: With them the output carries a mean `loss`. Classification: int64 (B,), cross-entropy; of any number
                of classes, float (B, C) of zeros and ones, binary cross-entropy. Regression: float (B,), squared error.
                Token classification: int64 (B, L), cross-entropy, -100 where there is none.
                Question answering: int64 (B, 2), the answer's first and last token, the mean cross-entropy of both.
            length_config: Tokens left after each layer, and layers that are skipped; None runs the plain model.
        Returns:
            An output whose `logits` are (B, C), or (B, L, C) of a head that reads every token, C being 2 for the start
            and the end of an answer.
        Raises:
            ValueError: The config has another number of layers, or a sequence starts with padding.
        Source: Kim & Cho 2021, "Drop-and-Restore".
        """
        if length_config is not None and length_config.num_layers != self.num_layers:
            raise ValueError(f"The length config has {length_config.num_layers} layers, the model {self.num_layers}.")
        mask_BL, num_tokens_B = real_tokens(input_ids, attention_mask)
        counts_BN = None if length_config is None else length_config.count_table(num_tokens_B)
        positions_BL = torch.arange(input_ids.size(1), device=input_ids.device).expand_as(input_ids)
        hidden = self.family.embed(self.network, input_ids, token_type_ids, positions_BL)
        restored = None
        arriving_B = num_tokens_B
        for layer in range(self.num_layers) if length_config is None else length_config.computed:
            keep_B = arriving_B if counts_BN is None else counts_BN[:, layer]
            drops = bool((keep_B < arriving_B).any())
            if drops and not self.reads_first:
                restored = restore(restored, hidden, positions_BL, mask_BL)
            hidden, score = attend(self.family, self.network, layer, hidden, positions_BL, mask_BL, with_scores=drops)
            if score is not None:
                kept_BK, mask_BL = significant(score, keep_B, mask_BL)
                hidden = hidden.take_along_dim(kept_BK[:, :, None], dim=1)
                positions_BL = positions_BL.take_along_dim(kept_BK, dim=1)
                arriving_B = keep_B
            hidden = self.family.feed_forward(self.network, layer, hidden)
        if self.reads_first:
            logits = self.family.classify(self.network, hidden)
        else:
            logits = self.family.read_tokens(self.network, restore(restored, hidden, positions_BL, mask_BL))
        return SequenceClassifierOutput(loss=None if labels is None else self.loss(logits, labels), logits=logits)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of logits, both as `forward` has them; of a shared batch, this process's part of it."""
        logits = logits.float()
        count: Tensor | int = len(labels)
        match self.task:
            case "classification" if self.is_multi_label:
                loss = F.binary_cross_entropy_with_logits(logits, labels.float())
            case "regression":
                loss = F.mse_loss(logits[:, 0], labels.float())
            case "token-classification":
                count = (labels != IGNORED).sum()
                total = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum")
                loss = total / count.clamp(min=1)  # of no labels the mean would be no number
            case "question-answering":
                loss = F.cross_entropy(logits, labels)  # over the tokens, for start and end at once
            case _:
                loss = F.cross_entropy(logits, labels)
        return loss * share_of(count, loss.device)

    def _is_encoder_weight(self, name: str) -> bool:
        return name.startswith(f"{self.network.base_model_prefix}.") and ".pooler." not in name

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and safetensors weights as transformers does; plain transformers loads the folder too."""
        self.network.save_pretrained(folder)

    def fingerprint(self, *, encoder_only: bool = False) -> str:
        """SHA-256 over names, shapes and values of the weights: equal wherever and in whatever file they lie.

        What tokens are ranked by is part of it where it is not the usual, since it decides what the weights give.

        Args:
            encoder_only: Leave out the task head and the pooler, which a fresh head comes with, and the ranking.
        """
        digest = hashlib.sha256()
        if not encoder_only and self.token_score != TOKEN_SCORES[0]:
            digest.update(self.token_score.encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            if encoder_only and not self._is_encoder_weight(name):
                continue
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def read_config(source: str | Path, **changes: Any) -> PreTrainedConfig:
    """The configuration of a folder or hub id, once it is clear that its architecture is one of ours.

    Args:
        source: Folder or hub id.
        changes: Fields to override.
    Raises:
        CheckpointError: There is none, or it is of an architecture or a setting that is not supported.
    """
    if Path(source).is_file():
        raise CheckpointError(f"{source} is a file; give the model's folder.")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source, local_files_only=only_local_files(source), **changes
        )
    except Exception as error:  # the library raises whatever its parsers do
        raise CheckpointError(explain_load_failure(source, error)) from error
    if config.model_type not in FAMILIES:
        raise CheckpointError(f"{source} holds a {config.model_type!r} model; supported are {', '.join(FAMILIES)}.")
    _check_config(config, source)
    return config


def labels_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """The names of a config's labels in order of their ids, in whatever order its file has them."""
    names: dict[int, str] = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    return tuple(names[number] for number in sorted(names))


def given_labels(config: PreTrainedConfig) -> tuple[str, ...]:
    """As `labels_of`; none where nobody named them and transformers numbers them."""
    names = labels_of(config)
    return () if names == tuple(f"LABEL_{number}" for number in range(len(names))) else names


def max_tokens(source: str | Path) -> int:
    """The longest sequence that a folder's or hub id's encoder takes, special tokens included.

    Raises:
        CheckpointError: There is none, or it is not supported.
    """
    config = read_config(source)
    return FAMILIES[config.model_type].max_tokens(config)


def significant(
    score_BL: Tensor, keep_B: np.ndarray[Any, np.dtype[np.int64]] | int, mask_BL: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Which tokens to keep: [CLS] and each sequence's most attended others, in reading order.

    Args:
        score_BL: Attention each token received.
        keep_B: Tokens to keep of each sequence, or one count for all; at least 1 and no more than are real.
        mask_BL: True at real tokens; None where all are real.
    Returns:
        Their places among those that arrived, int64 (B, K), K being the largest count, and their mask (B, K): None
        where every sequence keeps K tokens; else slots past a sequence's own count are padding.
    Raises:
        ValueError: A count is outside 1..L.
    Source: Kim & Cho 2021, "Drop-and-Restore"; the score is from Goyal et al. 2020 (PoWER-BERT).
    """
    size, length = score_BL.shape
    counts_B = np.broadcast_to(np.asarray(keep_B, dtype=np.int64), (size,))
    most, least = int(counts_B.max()), int(counts_B.min())
    if least < 1 or most > length:
        raise ValueError(f"keep={least if least < 1 else most}, but {length} tokens arrive; choose 1..{length}.")
    if mask_BL is not None:
        score_BL = score_BL.masked_fill(~mask_BL, -torch.inf)
    places_BK = significance_order(score_BL)[:, :most]
    kept_mask_BK = None
    if least < most:
        counts_B1 = torch.from_numpy(counts_B.copy()).to(score_BL.device)[:, None]
        surplus = torch.arange(most, device=score_BL.device) >= counts_B1
        places_BK = places_BK.masked_fill(surplus, length)  # sorts behind every real place
    places_BK = places_BK.sort(dim=1).values
    if least < most:
        kept_mask_BK = places_BK < length
        places_BK = places_BK.clamp(max=length - 1)
    return places_BK, kept_mask_BK


def restore(restored_BLD: Tensor | None, hidden_BKD: Tensor, positions_BK: Tensor, mask_BK: Tensor | None) -> Tensor:
    """Put tokens' vectors back at their places among those of tokens that were dropped before.

    Args:
        restored_BLD: The last vectors of all tokens so far; None where none was dropped yet, so that all are there.
        hidden_BKD: Newer vectors of some tokens.
        positions_BK: Where those stand.
        mask_BK: True at real tokens; None where all are real.
    """
    if restored_BLD is None:
        return hidden_BKD
    nowhere = restored_BLD.size(1)
    if mask_BK is not None:
        positions_BK = positions_BK.masked_fill(~mask_BK, nowhere)
    with_nowhere = F.pad(restored_BLD, (0, 0, 0, 1))
    places_BKD = positions_BK[:, :, None].expand_as(hidden_BKD)
    return with_nowhere.scatter(1, places_BKD, hidden_BKD.to(with_nowhere.dtype))[:, :nowhere]


def significance_order(score_BL: Tensor) -> Tensor:
    """Positions of each sequence's tokens, [CLS] first and then the most attended first; (B, L).

    Among equal scores the earlier token wins, so that the order does not depend on padding or batch mates.
    """
    score_BL = F.pad(score_BL[:, 1:], (1, 0), value=torch.inf)  # the classifier reads [CLS]
    return score_BL.sort(dim=1, descending=True, stable=True).indices


def real_tokens(
    input_ids_BL: Tensor, attention_mask_BL: Tensor | None
) -> tuple[Tensor | None, np.ndarray[Any, np.dtype[np.int64]]]:
    """The boolean mask (None where nothing is padded) and each sequence's number of real tokens."""
    size, length = input_ids_BL.shape
    if attention_mask_BL is None:
        return None, np.full(size, length, dtype=np.int64)
    mask_BL = attention_mask_BL.bool()
    if not bool(mask_BL[:, 0].all()):
        raise ValueError("A sequence starts with padding; pad on the right, so that [CLS] comes first.")
    num_tokens_B = mask_BL.sum(dim=1).cpu().numpy()
    return (None if (num_tokens_B == length).all() else mask_BL), num_tokens_B


def check_task(task: str) -> None:
    """Refuse a task that no head is there for, by a `ValueError` that lists the known ones."""
    if task not in TASKS:
        raise ValueError(f"task={task!r} is not supported; choose one of {', '.join(TASKS)}.")


def _check_config(config: Any, source: str | Path) -> None:
    """Refuse settings of the architecture that the layer loop does not honour."""
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise CheckpointError(f"{source} is a decoder; LengthDrop needs a bidirectional encoder.")
    if getattr(config, "position_embedding_type", "absolute") not in ("absolute", None):
        raise CheckpointError(
            f"{source} uses {config.position_embedding_type!r} positions; only absolute ones are supported."
        )
    if token_score(config) not in TOKEN_SCORES:
        raise CheckpointError(
            f"{source} ranks tokens by {token_score(config)!r}; supported are {', '.join(TOKEN_SCORES)}."
        )


def explain_load_failure(source: str | Path, error: Exception) -> str:
    """One sentence for whatever a loader raised on a folder or hub id."""
    path = Path(source)
    lines = (str(error).strip() or type(error).__name__).splitlines()
    first_line = f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    if path.is_dir():
        if not (path / "config.json").is_file():
            return f"{source} is no model folder: it has no config.json; give one that `save_pretrained` wrote."
        if isinstance(error, SafetensorError | UnpicklingError):
            return f"The weights in {source} are damaged or cut off ({first_line}); fetch or save the model again."
        return f"Cannot load the model in {source}: {first_line}"
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1:
        return f"There is no model folder {source}; give one that exists, or a hub id as in 'owner/name'."
    return f"{source} is no local folder and could not be fetched from the hub ({first_line}); give a local folder."
