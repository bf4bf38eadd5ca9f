"""Base training and the chat tune, one loop: Muon for matrices, AdamW for the rest, linear decay to zero.

    python -m training.train --data DIR --out DIR --tokens 320e6                      # base
    python -m training.train --data DIR --out DIR --tune --init DIR/base.safetensors  # chat tune
    torchrun --nproc-per-node 4 -m training.train ...                                 # the same on four GPUs

Every process builds the same global batch, takes its rows of it and averages gradients with the others: the loss curve
is that of one process. Owns batches, optimizers and schedules. Writes OUT/<name>.safetensors (bfloat16 masters), OUT/<name>.packed.safetensors
(the file's blocks, what export.py wraps) and OUT/<name>.jsonl (metrics). Never reads text.
"""

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.data import NO_LOSS
from training.model import Storyteller, StorytellerConfig, prefer_cudnn_attention, weight_type
from training.quantize import decode, encode
from training.tokenizer import BOS_ID, EOS_ID

# Share of rows per group, first while the rate is high, then in the decay (what it is for last: plain tales, our own
# stories without chat form, and the chats).
MIX = {
    "tales": (0.12, 0.22),
    "children": (0.36, 0.25),
    "novels": (0.36, 0.13),
    "made": (0.08, 0.20),
    "tune": (0.08, 0.20),
}
TUNE_MIX = {"tune": 0.80, "made": 0.06, "tales": 0.09, "children": 0.05}
BALANCE_WEIGHT = 0.01
DISTIL = 0.75  # share of the teacher's distribution in the loss


class Pace:
    """How far a run is: 0 at its start, 1 at its end, which is a number of steps or a time of day, whichever is first.

    With a time of day the remaining steps are counted anew every 20 steps from the best speed of the last 60 (a
    compilation's minute is no speed), and every process takes the first one's count.
    """

    def __init__(self, steps: int, until: float, device: torch.device) -> None:
        self.steps, self.until, self.device = steps, until, device
        self.step, self.progress, self.end = 0, 0.0, float(steps)
        self.last, self.times = time.time(), list[float]()

    def advance(self) -> bool:
        """One step is done; False when it was the last."""
        self.step += 1
        if self.until and self.step % 20 == 0:
            now = time.time()
            self.times, self.last = [*self.times[-2:], now - self.last], now
            left = max(0.0, self.until - now) * (20 / min(self.times))
            if len(self.times) == 1 and left > 0:
                left = self.steps  # the first 20 steps hold the compilation
            end = torch.tensor(min(self.steps, self.step + left), dtype=torch.float64, device=self.device)
            if dist.is_initialized():
                dist.broadcast(end, 0)
            self.end = float(end)
        remaining = self.end - self.step
        if remaining < 1:
            return False
        self.progress += (1 - self.progress) / (remaining + 1)
        return True


class Windows:
    """Rows of `length` + 1 tokens of one array, each token once an epoch: cut at a random phase, then shuffled."""

    def __init__(self, tokens: np.ndarray, length: int, rng: np.random.Generator) -> None:
        self.tokens, self.length, self.rng, self.starts = tokens, length, rng, np.empty(0, np.int64)

    def take(self, count: int) -> np.ndarray:
        while len(self.starts) < count:
            phase = int(self.rng.integers(self.length))
            starts = np.arange(phase, len(self.tokens) - self.length - 1, self.length)
            self.starts = np.concatenate([self.starts, self.rng.permutation(starts)])
        starts, self.starts = self.starts[:count], self.starts[count:]
        return self.tokens[starts[:, None] + np.arange(self.length + 1)]


class Packed:
    """Rows that start at a document's beginning and hold whole documents while they fit, filled with ignored EOS."""

    def __init__(self, tokens: np.ndarray, length: int, rng: np.random.Generator) -> None:
        bounds = np.append(np.flatnonzero((tokens & ~NO_LOSS) == BOS_ID), len(tokens))
        documents = [tokens[a:b] for a, b in pairwise(bounds)]
        # a long tale is cut; a conversation never is: it would teach answers without their end
        self.documents = [d[: length + 1] for d in documents if len(d) <= length + 1 or d.max() < NO_LOSS]
        self.length, self.rng, self.rows = length, rng, np.empty((0, length + 1), np.uint16)

    def take(self, count: int) -> np.ndarray:
        while len(self.rows) < count:
            rows, row, used = [], np.full(self.length + 1, EOS_ID | NO_LOSS, np.uint16), 0
            for index in self.rng.permutation(len(self.documents)):
                document = self.documents[index]
                if used + len(document) > self.length + 1:
                    rows.append(row)
                    row, used = np.full(self.length + 1, EOS_ID | NO_LOSS, np.uint16), 0
                row[used : used + len(document)] = document
                used += len(document)
            self.rows = np.concatenate([self.rows, np.stack(rows)])
        rows_now, self.rows = self.rows[:count], self.rows[count:]
        return rows_now


def all_reduce_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """Every gradient becomes the mean over the processes, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    pieces = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [piece.view_as(g) for piece, g in zip(pieces, gradients, strict=True)])


def split(rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T]; targets that carry NO_LOSS are -100."""
    host = torch.from_numpy(rows.astype(np.int32))
    host = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
    mask = int(NO_LOSS)
    inputs, targets = (host[:, :-1] & (mask - 1)).long(), host[:, 1:].long()
    return inputs, torch.where(targets >= mask, -100, targets)


# --------------------------------------------------------------------------------------------------------- optimizer


def orthogonalize(update: Tensor) -> Tensor:
    """Newton-Schulz (5 steps, bfloat16) of [N, rows, columns]: every singular value to about 1. Muon, Jordan 2024."""
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum 0.95 (Nesterov), orthogonalized, scaled to AdamW's root-mean-square 0.2 (Liu et al. 2025), batched by shape."""

    def __init__(self, params: list[nn.Parameter], weight_decay: float) -> None:
        self.weight_decay = weight_decay
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for p in params:
            by_shape.setdefault(tuple(p.shape), []).append(p)
        self.groups = [(ps, torch.zeros(len(ps), *shape, device=ps[0].device)) for shape, ps in by_shape.items()]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for params, momentum in self.groups:
            grad = torch.stack([p.grad for p in params])  # type: ignore[misc]
            momentum.lerp_(grad, 0.05)
            update = grad.lerp(momentum, 0.95).flatten(0, -3)
            scale = 0.2 * math.sqrt(max(update.shape[-2:]))
            update = orthogonalize(update).view_as(momentum).float()
            torch._foreach_mul_(params, 1 - rate * self.weight_decay)
            torch._foreach_add_(params, list((update * (-rate * scale)).unbind(0)))


def split_parameters(model: Storyteller) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices for Muon; embedding, router and norms for AdamW."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        (matrices if p.ndim >= 2 and "embd" not in name and "gate_inp" not in name else rest).append(p)
    return matrices, rest


# -------------------------------------------------------------------------------------------------------- evaluation


@torch.compiler.set_stance("force_eager")  # the odd shapes of evaluation are not worth their compile time
@torch.no_grad()
def nats_per_token(
    model: Storyteller, tokens: np.ndarray, length: int, device: torch.device, rows: int = 16
) -> tuple[float, int]:
    """Summed -log p and the count of targets, windows of `length` with half of each as context. BOS is never a target."""
    model.eval()
    total, count = 0.0, 0
    stride = length // 2
    starts = list(range(0, max(1, len(tokens) - stride), stride))
    for first in range(0, len(starts), rows):
        batch = np.full((len(starts[first : first + rows]), length + 1), EOS_ID, np.int64)
        targets_used = np.zeros((len(batch), length), bool)
        for i, start in enumerate(starts[first : first + rows]):
            piece = tokens[start : start + length + 1]
            batch[i, : len(piece)] = piece
            targets_used[i, (0 if start == 0 else length - stride) : len(piece) - 1] = True
        rows_t = torch.from_numpy(batch).to(device)
        used = torch.from_numpy(targets_used).to(device) & (rows_t[:, 1:] != BOS_ID)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(rows_t[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows_t[:, 1:].flatten(), reduction="none").view_as(used)
        total += float(loss[used].double().sum())
        count += int(used.sum())
    model.train()
    return total, count


def bits_per_byte(
    model: Storyteller, tokens: np.ndarray, num_bytes: int, length: int, device: torch.device
) -> float:
    return nats_per_token(model, tokens, length, device)[0] / math.log(2) / num_bytes


def save(model: Storyteller, out: Path, name: str) -> None:
    metadata = {"config": json.dumps(dataclasses.asdict(model.config))}
    tensors = {k: p.detach().cpu() for k, p in model.gguf_tensors()}
    save_file({k: t.bfloat16().contiguous() for k, t in tensors.items()}, out / f"{name}.safetensors", metadata)
    if not model.config.quantized:
        return  # a teacher
    packed = {k: t if weight_type(k) == "F32" else encode(t, weight_type(k)) for k, t in tensors.items()}
    save_file({k: t.contiguous() for k, t in packed.items()}, out / f"{name}.packed.safetensors", metadata)


def load_packed(path: Path) -> Storyteller:
    """The model exactly as shipped: weights decoded from the file's blocks, no further quantization."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        config = StorytellerConfig(**json.loads(file.metadata()["config"]))
    model = Storyteller(dataclasses.replace(config, quantized=False, dropout=0.0))
    model.load_state_dict(load_weights(path))
    return model.eval()


def load_weights(path: Path) -> dict[str, Tensor]:
    """float32 parameters from a checkpoint: masters, or a .packed file's blocks decoded."""
    state = {}
    for name, tensor in load_file(path).items():
        kind = weight_type(name)
        packed = tensor.dtype == torch.uint8
        state[name.removesuffix(".weight")] = decode(tensor, kind) if packed else tensor.float()
    return state


def load_teacher(path: Path) -> Storyteller:
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        config = StorytellerConfig(**json.loads(file.metadata()["config"]))
    teacher = Storyteller(dataclasses.replace(config, dropout=0.0))
    teacher.load_state_dict(load_weights(path))
    return teacher.eval().requires_grad_(False)


def batches(args: argparse.Namespace, pace: Pace, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """uint16 rows [B, T + 1] of the global batch, one a step. The tune and the end of base training use the full context."""
    arrays = {n: np.load(args.data / f"{n}.npy") for n in (TUNE_MIX if args.tune else MIX)}
    if not args.tune:
        arrays["tune"] = arrays["tune"] & ~NO_LOSS  # questions are text like any other
    kinds = Packed if args.tune else Windows
    short, long = args.length, args.long_length
    sources = {
        t: {n: kinds(a, t, rng) for n, a in arrays.items()} for t in ({long} if args.tune else {short, long})
    }
    while True:
        length = long if args.tune or pace.progress >= args.long_from else short
        late = max(0.0, (pace.progress - args.decay_from) / (1 - args.decay_from))
        if args.tune:
            shares = list(TUNE_MIX.values())
        else:
            shares = [early + (end - early) * min(1.0, 2 * late) for early, end in MIX.values()]
        counts = rng.multinomial(args.batch_tokens // length, np.array(shares) / sum(shares))
        rows = np.concatenate([s.take(n) for s, n in zip(sources[length].values(), counts, strict=True) if n])
        yield rng.permutation(rows)  # so that no process gets one source only


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="")
    parser.add_argument("--tokens", type=float, default=320e6, help="tokens to train on, repeats counted")
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--long-length", type=int, default=2048)
    parser.add_argument("--long-from", type=float, default=0.75, help="progress at which rows become long")
    parser.add_argument(
        "--decay-from", type=float, default=0.5, help="progress at which the rate starts to fall to 0"
    )
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--init", type=Path, help="start from these weights")
    parser.add_argument("--teacher", type=Path, nargs="*", default=[],
                        help="distil: .safetensors of larger models trained on the same data; each process and step uses "
                        "one in turn, which in the mean is the gradient of their averaged distribution")  # fmt: skip
    parser.add_argument(
        "--until", type=float, default=0.0, help="time (Unix seconds) to be done by; 0: all --tokens"
    )
    parser.add_argument("--tune", action="store_true", help="chat tune: packed conversations mixed with tales")
    parser.add_argument("--config", default="{}", help="JSON of StorytellerConfig fields that differ")
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--adam", action="store_true",
                        help="AdamW for the matrices too: on a CPU Newton-Schulz costs more than the rest of a step")  # fmt: skip
    parser.add_argument("--save-every", type=int, default=0, help="steps between checkpoints besides the last")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument(
        "--no-heldout", action="store_true", help="skip the held-out figures (probes must not see them)"
    )
    parser.add_argument("--bfloat16", action="store_true", help="bfloat16 products on a CPU too")
    parser.add_argument("--warmup", type=int, default=100, help="steps of rising rate")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    name = args.name or ("tune" if args.tune else "base")
    if args.tune:
        args.decay_from = 0.0

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = (
        64  # two kinds of block, two lengths, train and eval, student and teacher
    )
    prefer_cudnn_attention()
    meta = json.loads((args.data / "meta.json").read_text())
    fields = {"vocab_size": meta["vocab_size"], **json.loads(args.config), "dropout": args.dropout}
    config = StorytellerConfig(**fields)
    model = Storyteller(config).to(device)
    if args.init:
        model.load_state_dict(load_weights(args.init))
    torch.manual_seed(args.seed + rank)  # weights are alike in every process, dropout is not
    if not args.no_compile:
        for block in model.blk:
            block.compile(dynamic=False)

    def loss_of(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(x, head.to(x.dtype)).float().flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")

    def distil_loss(x: Tensor, head: Tensor, teacher_x: Tensor, teacher_head: Tensor, targets: Tensor) -> Tensor:
        """DISTIL * KL(teacher || student) + (1 - DISTIL) * cross entropy; returns it and the cross entropy, sums."""
        student = F.linear(x, head.to(x.dtype)).float().log_softmax(-1).flatten(0, 1)
        soft = F.linear(teacher_x, teacher_head.to(teacher_x.dtype)).float().log_softmax(-1).flatten(0, 1)
        used = targets.flatten() >= 0
        hard = F.nll_loss(student, targets.flatten(), ignore_index=-100, reduction="sum")
        divergence = ((soft.exp() * (soft - student)).sum(-1) * used).sum()
        return torch.stack([DISTIL * divergence + (1 - DISTIL) * hard, hard])

    head_loss = loss_of if args.no_compile else torch.compile(loss_of, dynamic=False)
    count = max(1, len(args.teacher))
    turns = {(step * world + rank) % count for step in range(count)}
    teachers = {i: load_teacher(path).to(device) for i, path in enumerate(args.teacher) if i in turns}
    if teachers and not args.no_compile:
        for block in (block for teacher in teachers.values() for block in teacher.blk):
            block.compile(dynamic=False)
        distil_loss = torch.compile(distil_loss, dynamic=False)
    matrices, rest = split_parameters(model)
    if args.adam:
        matrices, rest = [], matrices + rest
    muon = Muon(matrices, args.weight_decay)
    adam = torch.optim.AdamW(rest, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda")

    steps = int(args.tokens // args.batch_tokens)
    rng = np.random.default_rng(args.seed)
    val = np.load(args.data / "val.npy")
    log = (args.out / f"{name}.jsonl").open("w") if rank == 0 else None

    def report(**values: object) -> None:
        if log is not None:
            line = json.dumps(values)
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()

    report(parameters=sum(p.numel() for p in model.parameters()), steps=steps, processes=world,
           **dataclasses.asdict(config))  # fmt: skip
    started, seen, logged = time.monotonic(), 0, 0
    running = torch.zeros(2, device=device)
    pace = Pace(steps, args.until, device)
    more = True
    for rows in batches(args, pace, rng):
        step, progress = pace.step, pace.progress
        falling = 1.0 if progress < args.decay_from else (1 - progress) / (1 - args.decay_from)
        rate = args.rate * min(1.0, (step + 1) / args.warmup) * falling
        inputs, targets = split(rows[rank::world], device)
        # every process divides by the global batch's targets, so that the mean of gradients is the global gradient
        share = world / max(1, int((rows[:, 1:] < NO_LOSS).sum()))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or args.bfloat16):
            x, head, balance = model.hidden(inputs)
            if not teachers:
                loss = objective = head_loss(x, head, targets)
            else:
                teacher = teachers[(step * world + rank) % count]
                with torch.no_grad():
                    teacher_x, teacher_head, _ = teacher.hidden(inputs)
                objective, loss = distil_loss(x, head, teacher_x, teacher_head, targets).unbind()
        (objective * share + BALANCE_WEIGHT * balance).backward()
        if world > 1:
            all_reduce_gradients(matrices + rest, world)
        nn.utils.clip_grad_norm_(rest, 1.0)
        muon.step(rate)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        model.zero_grad(set_to_none=True)
        running += torch.stack([loss.detach() * share, balance.detach()])
        seen += rows[:, 1:].size
        more = pace.advance()
        if pace.step % args.log_every == 0 or not more:
            if world > 1:
                dist.all_reduce(running)
            mean = (running / world / (pace.step - logged)).tolist()
            report(step=pace.step, loss=mean[0], balance=mean[1], rate=rate, tokens=seen, end=round(pace.end),
                   seconds=round(time.monotonic() - started, 1))  # fmt: skip
            running.zero_()
            logged = pace.step
        if rank == 0 and (pace.step % args.eval_every == 0 or not more):
            report(step=pace.step, val_bpb=bits_per_byte(model, val, meta["bytes"]["val"], 1024, device))
        if rank == 0 and (not more or (args.save_every and pace.step % args.save_every == 0)):
            save(model, args.out, name)
        if not more:
            break
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    for source, size in meta["bytes"].items():
        if source.startswith("heldout") and not args.no_heldout:
            nats, count = nats_per_token(model, np.load(args.data / f"{source}.npy"), args.long_length, device)
            report(source=source, bpb=nats / math.log(2) / size, perplexity=math.exp(nats / count), tokens=count)
    report(done=True, seconds=round(time.monotonic() - started, 1))


if __name__ == "__main__":
    main()
