"""A policy as its users hold it: observations and a sentence in, a chunk of actions and a value out, in robot units.

A policy folder is what stages sft and package write; loading reads config.json, model.safetensors and the processor's
files, nothing executable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from prts_core.config.checked_yaml import check
from prts_core.config.identity import identity
from prts_core.config.model import Compat, ModelConfig, PolicyDtype
from prts_core.contract import PolicyContract
from prts_core.io.errors import CheckpointError, ConfigError, DataError
from prts_core.io.files import digest_file, digest_value, read_json, write_json
from prts_core.io.tensors import MAX_SHARD_BYTES, load_sharded, load_weights, save_sharded, weight_files
from prts_core.models.backbone import fill_buffers
from prts_core.models.generate import generate
from prts_core.models.heads.flow.realtime import Committed, require_fits
from prts_core.models.prts import PrtsModel
from prts_core.models.suffix import read_suffix
from prts_core.models.tokens import Encoded, Prefix
from prts_core.policy.observation import (
    Answer,
    ObservationBatch,
    UnderWay,
    read_actions,
    read_observation,
    read_seeds,
    sentences,
)
from prts_core.policy.processor import FILES, Processor
from prts_core.policy.quantized import FILE as QUANTIZATION
from prts_core.policy.quantized import dtype_of as packed_dtype
from prts_core.policy.quantized import hold, read_scheme, require_plain_head
from prts_core.text import prompt
from prts_core.text.tokenizer import TextTokenizer

MODEL_TYPE = "prts_qwen3_vl"
EMBEDDINGS = "language_model.embed_tokens.weight"
MAX_SUBTASK_TOKENS = 32  # public forks cut at 20 to 52


class Policy:
    """act and value are deterministic: noise is drawn from the seeds given, one per sample."""

    def __init__(self, model: PrtsModel, processor: Processor) -> None:
        self.model, self.processor = model.eval(), processor

    @property
    def contract(self) -> PolicyContract:
        return self.processor.contract

    @property
    def speaks(self) -> bool:
        """Whether it says its subtask before it acts."""
        return self.processor.subtasks

    def drift(self, state: np.ndarray) -> np.ndarray:
        """(B, D) states in robot units -> (B,): how far they lie outside the training data's 1 to 99 % range, in widths
        of it, the mean over dimensions; 0 inside."""
        seen = self.processor.statistics.state
        width = np.maximum(seen.q99 - seen.q01, 1e-6)
        return (np.maximum(np.maximum(seen.q01 - state, state - seen.q99), 0.0) / width).mean(-1)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> Literal["bf16", "fp32"]:
        """What the network computes in. Rotary angles, norms' statistics, the flow's state and the value are fp32."""
        return "bf16" if self.model.language_model.embed_tokens.weight.dtype == torch.bfloat16 else "fp32"

    def act(
        self,
        observation: Mapping[str, np.ndarray],
        instruction: str | Sequence[str],
        seeds: int | Sequence[int],
        subtask: str | Sequence[str] | None = None,
    ) -> np.ndarray:
        """Action chunks (B, T, A) float32 in robot units, or (T, A) for an observation without a batch axis.

        observation: {"observation.state": (D,) or (B, D), camera key: (H, W, 3) or (B, H, W, 3) uint8}; one sentence,
        or one a sample; one noise seed a sample. subtask: what a policy that reasons in subtasks has said (from
        `subtask`, kept for a while); none lets it say the next one first. Raises DataError where an input does not fit
        the contract.
        """
        return self.answer(observation, instruction, seeds, subtask).actions

    def act_and_value(
        self, observation: Mapping[str, np.ndarray], instruction: str | Sequence[str], seeds: int | Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `act` gives and what `value` gives for it; the pictures are looked at once."""
        answer = self.answer(observation, instruction, seeds, value=True)
        assert answer.values is not None
        return answer.actions, answer.values

    def answer(
        self,
        observation: Mapping[str, np.ndarray],
        instruction: str | Sequence[str],
        seeds: int | Sequence[int],
        subtask: str | Sequence[str] | None = None,
        value: bool = False,
        under_way: UnderWay | None = None,
        draws: int = 1,
    ) -> Answer:
        """All of one request: actions, where asked for their value, and the words of a policy that said some. The
        arguments are those of `act`; under_way: chunks that the answer goes on from, its first `delay` rows theirs.
        draws: of this many chunks the one of the highest value is the answer; the pictures are looked at once.
        ConfigError where a chunk is too short to bridge the delay, or all draws would be alike."""
        # Guidance asks the network for gradients, which inference mode has done with for good.
        with torch.inference_mode() if under_way is None else torch.no_grad():
            return self._answer(observation, instruction, seeds, subtask, value, under_way, draws)

    def _answer(
        self,
        observation: Mapping[str, np.ndarray],
        instruction: str | Sequence[str],
        seeds: int | Sequence[int],
        subtask: str | Sequence[str] | None,
        value: bool,
        under_way: UnderWay | None,
        draws: int,
    ) -> Answer:
        batch = read_observation(observation, instruction, self.contract.contract)
        drawn, single = read_seeds(seeds, batch), batch.single
        encoded, prefix, said = self.look(batch, None if subtask is None else sentences(subtask, len(batch)))
        config = self.model.config
        width = len(self.contract.contract.action)
        if draws > 1:
            self._require_chance()
            batch, encoded, prefix = batch.repeated(draws), encoded.repeated(draws), prefix.repeated(draws)
            under_way = None if under_way is None else under_way.repeated(draws)
        shape = (draws, config.chunk_length, config.max_action_dim)
        noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in drawn])
        noise = noise.to(self.device)
        mask = torch.zeros_like(noise)
        mask[..., :width] = 1.0
        committed = None if under_way is None else self._committed(under_way, batch)
        chunk = self.model.sample(prefix, noise, mask, committed)[..., :width]
        actions = self.processor.unnormalize_actions(chunk.cpu().numpy(), batch.state)
        if under_way is not None:
            for own, rows, delay in zip(actions, under_way.rows, under_way.delay.tolist(), strict=True):
                own[:delay] = rows[:delay]  # to the bit, whatever normalising has rounded
        values = self.value_of(encoded, batch, actions) if value or draws > 1 else None
        if draws > 1:
            assert values is not None
            best = values.reshape(-1, draws).argmax(1) + np.arange(0, len(values), draws)
            actions, values = actions[best], values[best]
        if single:
            return Answer(actions[0], None if values is None else values[0], said)
        return Answer(actions, values, said)

    def _require_chance(self) -> None:
        """ConfigError where a policy answers alike whatever the seed."""
        if getattr(self.model.config.expert, "noise_scale", 0.0) == 0:
            raise ConfigError(
                "This policy answers one observation alike at every draw: there is nothing to choose from",
                field="draws",
                found="an action head without noise",
                expected="a flow head with expert.noise_scale above 0",
                cure="serve it without --best-of, or fine-tune with expert.noise_scale: 1",
            )

    def _committed(self, under_way: UnderWay, batch: ObservationBatch) -> Committed:
        """The rows as the network knows them: normalised, relative ones from where the robot is now."""
        config, width = self.model.config, len(self.contract.contract.action)
        rows = read_actions(under_way.rows, batch)
        for delay, executed in zip(under_way.delay.tolist(), under_way.executed.tolist(), strict=True):
            require_fits(delay, executed, config.chunk_length)
        padded = np.zeros((*rows.shape[:2], config.max_action_dim), np.float32)
        padded[..., :width] = self.processor.normalize_actions(rows, batch.state)
        found = (torch.from_numpy(array).to(self.device) for array in (padded, under_way.delay, under_way.executed))
        return Committed(*found)

    def look(
        self, batch: ObservationBatch, subtasks: list[str] | None = None
    ) -> tuple[Encoded, Prefix, list[str] | None]:
        """The encoded prompt, what the action head reads of it, and the words that the policy says where it reasons in
        subtasks and was given none."""
        if self.processor.subtasks and subtasks is None:
            return self._speak(batch)
        if subtasks is not None and not self.processor.subtasks:
            raise DataError(
                "This policy does not reason in subtasks",
                field="subtask",
                found=subtasks[0],
                expected="none",
                cure="give the instruction alone, or fine-tune the policy by stage subtask",
            )
        encoded = self.encode(batch, subtasks)
        return encoded, encoded.prefix(), None

    def encode(self, batch: ObservationBatch, subtasks: list[str] | None = None) -> Encoded:
        """The prompts of a batch, looked at once: for whoever reads more than one thing of it."""
        tokens = self.processor.tokens(batch.images, batch.state, batch.instructions, subtasks)
        return self.model.encode(tokens.to(self.device))

    @torch.inference_mode()
    def subtask(self, observation: Mapping[str, np.ndarray], instruction: str | Sequence[str]) -> str | list[str]:
        """The next subtask in words, greedily decoded: one, or one a sample; arguments as in `act`. DataError for a
        policy that was not fine-tuned to say any."""
        if not self.processor.subtasks:
            raise DataError("This policy does not reason in subtasks", cure="fine-tune it by stage subtask")
        batch = read_observation(observation, instruction, self.contract.contract)
        said = self._speak(batch)[2]
        return said[0] if batch.single else said

    def _speak(self, batch: ObservationBatch) -> tuple[Encoded, Prefix, list[str]]:
        tokenizer, closing = self.processor.tokenizer, self.processor.builder.turn_end
        rows = len(self.model.language_model.embed_tokens.weight)  # Qwen's own: more than tokens
        allowed = torch.zeros(rows, dtype=torch.bool, device=self.device)
        allowed[: len(tokenizer)] = torch.from_numpy(tokenizer.ascii_ids.copy())
        allowed[closing[0]] = True
        encoded = self.encode(batch, [""] * len(batch))
        words, prefix = generate(self.model, encoded, allowed=allowed, closing=closing, max_words=MAX_SUBTASK_TOKENS)
        return encoded, prefix, [tokenizer.decode(own).strip() for own in words]

    @torch.inference_mode()
    def value(
        self, observation: Mapping[str, np.ndarray], actions: np.ndarray, instruction: str | Sequence[str]
    ) -> np.ndarray:
        """Goal reachability (B,) float32 in nats, or one number for an observation without a batch axis.

        exp(scale) phi(s, a) . psi(l): the log-discounted chance of reaching the goal up to a constant of the
        instruction (PRTS, arXiv:2604.27472, theorem 1). actions: (B, T, A) or (T, A) in robot units; the rest as in
        `act`. Raises DataError where an input does not fit the contract.
        """
        batch = read_observation(observation, instruction, self.contract.contract)
        chunks = read_actions(actions, batch)
        nats = self.value_of(self.encode(batch), batch, chunks)
        return nats[0] if batch.single else nats

    def value_of(self, encoded: Encoded, batch: ObservationBatch, actions: np.ndarray) -> np.ndarray:
        """(B,) nats, from the encoded prompt and actions (B, T, A) in robot units: only their tokens are read anew."""
        suffix = self.processor.value_suffix(batch.state, batch.instructions, actions).to(self.device)
        hidden = read_suffix(self.model, encoded, suffix)
        return self.model.value(hidden, suffix.state_action_index, suffix.goal_index).cpu().numpy()


def save_policy(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    processor: Processor,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a policy folder (the files of `policy_files`)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model_type": MODEL_TYPE, **identity(config)})
    processor.save(folder)
    save_sharded(folder, weights, max_bytes=max_shard_bytes)


def read_model_config(folder: Path) -> ModelConfig:
    raw = read_json(folder / "config.json")
    if not isinstance(raw, dict) or raw.pop("model_type", None) != MODEL_TYPE:
        raise CheckpointError(
            "This folder holds no PRTS policy", file=folder / "config.json", field="model_type", expected=MODEL_TYPE
        )
    raw.pop("attention", None)  # older files hold it, and nothing ever read it
    return check(ModelConfig, raw, folder / "config.json")


def load_policy(folder: Path, dtype: PolicyDtype = "auto", device: torch.device | str | None = None) -> Policy:
    """Load a policy folder onto the GPU where there is one (or onto `device`), its weights straight in `dtype`; missing
    files, foreign weights and changed statistics are one CheckpointError."""
    missing = [name for name in policy_files(folder) if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            "A policy folder is not complete",
            file=folder,
            found=f"missing {', '.join(missing)}",
            expected=", ".join(policy_files(folder)),
            cure="point at the output of stage sft or package, or at models:/name@alias",
        )
    config = read_model_config(folder)
    if read_scheme(folder) is not None:
        if dtype == "fp32":
            raise CheckpointError(
                "A quantised policy computes in bf16",
                file=folder,
                field="--dtype",
                found=dtype,
                expected="auto or bf16",
            )
        dtype = "bf16"
    processor = Processor.load(folder, config)
    where = resolve_device(device)
    if where.type == "cuda":  # of the whole process: what stays in fp32 there stays for its digits, and TF32 has fewer
        torch.set_float32_matmul_precision("highest")
    model = load_network(folder, config, processor.tokenizer, processor.compat, _torch_dtype(dtype, where), where)
    return Policy(model, processor)


def load_network(
    folder: Path,
    config: ModelConfig,
    tokenizer: TextTokenizer,
    compat: Compat,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> PrtsModel:
    """The network whose weights lie in `folder`; its embeddings may have more rows than there are tokens."""
    weights = load_sharded(folder)
    rows = weights.shapes.get(EMBEDDINGS, (0,))[0]
    with torch.device("meta"):
        model = PrtsModel(config, max(rows, len(tokenizer)), tokenizer.id(prompt.IMAGE_PAD), compat)
    scheme = read_scheme(folder)
    fill_buffers(model, config)
    hold(model, scheme)
    load_weights(model, weights, folder, lambda name: packed_dtype(name, scheme) or _dtype_of(name, dtype), device)
    require_plain_head(model)
    return model.to(device)


def untrained_policy(
    folder: Path, seed: int, dtype: PolicyDtype = "auto", device: torch.device | str | None = None
) -> Policy:
    """The same network with fresh random weights, alike on every device: the floor that a benchmark compares with."""
    config = read_model_config(folder)
    processor = Processor.load(folder, config)
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    model = PrtsModel(config, len(tokenizer), tokenizer.id(prompt.IMAGE_PAD), processor.compat)
    where = resolve_device(device)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(where, _dtype_of(name, _torch_dtype(dtype, where)))
    return Policy(model.to(where), processor)


def resolve_device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def resolve_dtype(dtype: PolicyDtype, device: torch.device | str | None = None) -> Literal["bf16", "fp32"]:
    """What a policy that is loaded so computes in, here."""
    return "bf16" if dtype == "bf16" or (dtype == "auto" and resolve_device(device).type == "cuda") else "fp32"


def _torch_dtype(dtype: PolicyDtype, device: torch.device) -> torch.dtype:
    return torch.bfloat16 if resolve_dtype(dtype, device) == "bf16" else torch.float32


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """The value's heads stay in fp32: its temperature multiplies their last digits, and they are small."""
    return torch.float32 if name.startswith("crl_") else dtype


def policy_files(folder: Path) -> tuple[str, ...]:
    """Names of the files a policy folder consists of."""
    scheme = (QUANTIZATION,) if (folder / QUANTIZATION).is_file() else ()
    return ("config.json", *weight_files(folder), *FILES, *scheme)


def policy_digest(folder: Path) -> str:
    """Digest of exactly the files that decide what a policy does; the same in sft's output and in the package."""
    files = [folder / name for name in sorted(policy_files(folder)) if (folder / name).is_file()]
    return digest_value(
        [{"path": p.name, "size": p.stat().st_size, "sha256": digest_file(p).removeprefix("sha256:")} for p in files]
    )
