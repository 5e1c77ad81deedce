"""What does a policy cost, and does it cost more beside a million others?

Distinct revisions with real bytes, imported in batches, on SQLite and on PostgreSQL:
`python -m benchmarks catalog [--largest 1000000]`.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import psutil
import psycopg

from benchmarks.arms.protocol import versions
from benchmarks.crowded import NUM_REQUESTS, PROMPT_TOKENS, Crowd, ask_in_turns
from benchmarks.house import Line, Report, Spread, Unavailable, number, table, verdict
from benchmarks.processes import Stage
from openmint.catalog.catalog import Catalog
from openmint.catalog.records import Filters
from openmint.service.adapters import admit_all
from openmint.service.archives import PeftFolder
from openmint.store.folder_store import FolderStore
from openmint.store.peft_file import peft_tensors
from openmint.store.safetensors_header import encode_safetensors
from openmint.types import BaseInfo, Digest, LoraSpec, TargetModule, Tenant, stacks_of
from tests.postgres import find_binaries, running_postgres

SIZES = (1_000, 10_000, 100_000, 1_000_000)
NUM_TENANTS, BATCH = 10, 500
BUSY, BUSY_SHARE = "busy", 10
"""Every tenth revision of a tenant belongs to one policy; the others have one each."""
WIDTH = 1024
SPEC = LoraSpec(1, 2.0, train_mlp=False, train_unembed=False)
STACKS = stacks_of(
    TargetModule(f"model.layers.0.self_attn.{name}_proj", "attn", WIDTH, WIDTH) for name in "qkvo"
)
BASE = BaseInfo(
    "bench", Digest("sha256:" + "0" * 64), "llama", "", "bfloat16", "cpu", 10, 20, (), 30, 40, 50,
    STACKS,
)  # fmt: skip
CONFIG = b'{"peft_type": "LORA", "r": 1, "lora_alpha": 2}'
SMALL_BITS = 0x3C00
"""Of bfloat16 values from 0.0078 on."""
TAG, TASK, NUM_MARKED = "rare", "sums", 90
"""So many revisions of each tenant are tagged and have a score, whatever the size."""
NUM_RESOLVED, NUM_PAGES, NUM_PROMOTED = 2_000, 200, 100
PAGE = 100
MOST_RATIO, MOST_WARM_RATIO = 1.2, 1.1
KINDS = ("SQLite", "PostgreSQL")
MEASURED = (
    "Rank-1 PEFT adapters of 16 KB, all distinct, of one base; ten tenants. Nine of ten revisions "
    "have a policy of their own, the tenth is one of their tenant's busy policy. An import is what "
    f"`openmint import-all` has the gateway do, {BATCH} adapters at a time (100 for the smallest "
    "size): admission, one `put_many` with one sync, one transaction; making the adapters is not "
    "in it. Each size has a store of its own, and on each database a catalogue. Reads are the "
    "catalogue's own calls, with the databases in the system's page cache: "
    f"{NUM_RESOLVED} addresses `tenant/policy` at random, one of each size in turn, {NUM_PAGES} "
    f"pages of {PAGE} from a random place; search by tag and score finds as many at each size, "
    f"{NUM_MARKED} and half of them. `Open` is a new process's: the catalogue and the store, "
    "then one address and its bytes; memory is what that process grew by, after as many addresses. "
    "Warm requests are completions of one token from prompts of "
    f"{PROMPT_TOKENS} by a real service (SmolLM2-135M-Instruct), one on the smallest catalogue and "
    "one on the largest: adapters of all layers that lie among one tenant's others, asked for by "
    f"name one after another, the two services in turns, {NUM_REQUESTS} a repeat. "
    "Figures are medians of the repeats."
)


@dataclass(frozen=True)
class Import:
    """Seconds that an import of all took, by part."""

    admission: float
    store: float
    catalogue: float

    @property
    def whole(self) -> float:
        return self.admission + self.store + self.catalogue


@dataclass(frozen=True)
class Opened:
    """What a new process found."""

    open_ms: float
    first_ms: float
    grown_mib: float


@dataclass(frozen=True)
class Reads:
    """One turn of one size."""

    resolve_p50_us: float
    resolve_p99_us: float
    policies_ms: float
    revisions_ms: float
    prefix_ms: float
    tag_ms: float
    owner_ms: float
    score_ms: float
    bytes_us: float
    promotions_per_second: float


@dataclass
class House:
    """A catalogue and its store, filled to a size."""

    size: int
    url: str
    root: Path
    imported: Import
    database_mib: float
    opened: list[Opened] = field(default_factory=list)
    reads: list[Reads] = field(default_factory=list)
    crowd: Crowd | None = None
    """The service on it, of the smallest and the largest."""

    @property
    def folder(self) -> Path:
        """Of its store, and the service's data folder."""
        return self.root / "data"


def tenant_of(index: int) -> Tenant:
    return Tenant(f"tenant-{index % NUM_TENANTS}")


def owner_of(tenant: Tenant) -> str:
    return f"key-of-{tenant}"


def policy_of(index: int) -> str:
    nth = index // NUM_TENANTS
    return BUSY if nth % BUSY_SHARE == 0 else f"policy-{nth:07d}"


def adapter(index: int, size: int) -> PeftFolder:
    """The PEFT folder of one of a size's adapters; no two are equal, of no two sizes either."""
    drawn = np.random.default_rng((size, index))
    tensors = {}
    for name, shape in peft_tensors(BASE, SPEC).items():
        bits = drawn.integers(SMALL_BITS, SMALL_BITS + 256, shape, np.uint16)
        tensors[name] = ("BF16", shape, bits.tobytes())
    weights = encode_safetensors(tensors, {"format": "pt"})
    return PeftFolder(f"{policy_of(index)}/{index}", policy_of(index), CONFIG, weights)


def batches(size: int) -> Iterator[tuple[Tenant, list[int]]]:
    """The indices of each import; those of one are of one tenant."""
    most = min(BATCH, size // NUM_TENANTS)
    for start in range(0, size // NUM_TENANTS, most):
        for tenant in range(NUM_TENANTS):
            indices = [tenant + NUM_TENANTS * nth for nth in range(start, start + most)]
            yield tenant_of(tenant), [index for index in indices if index < size]


def fill(catalogs: Sequence[Catalog], store: FolderStore, size: int) -> list[Import]:
    """Import so many adapters as `openmint/service/adapters.py` would: bytes into the store, once,
    then records into each of the catalogues."""
    seconds = [0.0] * (2 + len(catalogs))
    for tenant, indices in batches(size):
        folders = [adapter(index, size) for index in indices]
        times = [time.monotonic()]
        admitted, refused = admit_all(folders, BASE, set())
        assert not refused, refused[0]
        times.append(time.monotonic())
        store.put_many(data for _, data, _ in admitted)
        times.append(time.monotonic())
        imports = [(folder.policy, blob) for folder, _, blob in admitted]
        for catalog in catalogs:
            catalog.policies_of_other_bases(tenant, {f.policy for f in folders}, BASE)
            catalog.import_revisions(tenant, BASE, imports, actor=owner_of(tenant))
            times.append(time.monotonic())
        seconds = [s + b - a for s, a, b in zip(seconds, times, times[1:], strict=False)]
    admission, stored, *recorded = seconds
    return [Import(admission, stored, each) for each in recorded]


def mark(catalog: Catalog, size: int) -> None:
    """Tag and score some revisions of each tenant, evenly spread over its policies but the busy."""
    num_policies = size // NUM_TENANTS * (BUSY_SHARE - 1) // BUSY_SHARE
    for nth in range(NUM_MARKED * NUM_TENANTS):
        policy_number = nth // NUM_TENANTS * num_policies // NUM_MARKED
        of_tenant = 1 + policy_number + policy_number // (BUSY_SHARE - 1)
        index = nth % NUM_TENANTS + NUM_TENANTS * of_tenant
        tenant, policy = tenant_of(index), policy_of(index)
        digest = catalog.resolve(tenant, address(index)).revision.digest
        catalog.set_tag(tenant, policy, digest, TAG, actor="benchmark")
        made = catalog.start_evaluation(
            tenant, policy_name=policy, digest=digest, base_name=BASE.name, task_name=TASK,
            task_digest=BASE.digest, num_items=NUM_MARKED,
        )  # fmt: skip
        outcomes = [item < nth // NUM_TENANTS for item in range(NUM_MARKED)]
        catalog.finish_evaluation(tenant, made.evaluation_id, outcomes)


def open_again(url: str, folder: Path, size: int) -> Opened:
    """Open what is there, in a process that has done nothing else."""
    process = psutil.Process()
    before = process.memory_info().rss
    started_at = time.monotonic()
    catalog, store = Catalog.open(url), FolderStore(folder)
    opened_at = time.monotonic()
    resolved = catalog.resolve(tenant_of(1), address(size // 2 + 1))
    assert store.get(resolved.revision.digest)
    first_at = time.monotonic()
    for index in np.random.default_rng(size).integers(0, size, NUM_RESOLVED):
        catalog.resolve(tenant_of(index), address(index))
    grown = process.memory_info().rss - before
    catalog.close()
    return Opened(1e3 * (opened_at - started_at), 1e3 * (first_at - opened_at), grown / 2**20)


def address(index: int) -> str:
    return f"{tenant_of(index)}/{policy_of(index)}"


def in_new_process(house: House) -> Opened:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(open_again, house.url, house.folder, house.size).result()


@dataclass(frozen=True)
class Open:
    """A house with its catalogue and store open."""

    house: House
    catalog: Catalog
    store: FolderStore

    def drawn(self, seed: int) -> list[int]:
        """Records to ask for."""
        numbers = np.random.default_rng((seed, self.house.size))
        return [int(index) for index in numbers.integers(0, self.house.size, NUM_RESOLVED)]


def resolve_in_turns(open_ones: Sequence[Open], seed: int) -> list[list[float]]:
    """Microseconds of each address, of each house. One address of each in turn: where the system
    happens to run a database's process makes more of a difference than a million revisions."""
    found: list[list[float]] = [[] for _ in open_ones]
    for indices in zip(*(each.drawn(seed) for each in open_ones), strict=True):
        for each, index, times in zip(open_ones, indices, found, strict=True):
            tenant, name = tenant_of(index), address(index)
            started_at = time.perf_counter()
            each.catalog.resolve(tenant, name)
            times.append(1e6 * (time.perf_counter() - started_at))
    return found


def read(this: Open, resolved: Sequence[float], seed: int) -> Reads:
    """One turn; the seed says which records are asked for. `resolved` are what that took."""
    catalog, store, size = this.catalog, this.store, this.house.size
    at_random = this.drawn(seed)
    some = at_random[:NUM_PAGES]
    digests = [catalog.resolve(tenant_of(index), address(index)).revision.digest for index in some]

    def policies(index: int) -> None:
        catalog.policies(tenant_of(index), limit=PAGE, cursor=f"{policy_of(index)}/0")

    def revisions(index: int) -> None:
        newest = size // NUM_TENANTS // BUSY_SHARE
        before = 2 + index % newest
        assert catalog.revisions(tenant_of(index), BUSY, limit=PAGE, before=before)

    def prefix(index: int) -> None:
        start = f"policy-{index // NUM_TENANTS:07d}"[:-1]
        assert catalog.policies(tenant_of(index), Filters(prefix=start), limit=PAGE).items

    def tag(index: int) -> None:
        assert catalog.find_revisions(tenant_of(index), Filters(tag=TAG), limit=PAGE).items

    def owner(index: int) -> None:
        mine = Filters(owner=owner_of(tenant_of(index)))
        catalog.find_revisions(tenant_of(index), mine, limit=PAGE, cursor=f"{index}/0")

    def score(index: int) -> None:
        good = Filters(task=TASK, min_score=0.5)
        assert catalog.find_revisions(tenant_of(index), good, limit=PAGE).items

    return Reads(
        statistics.median(resolved),
        float(np.percentile(resolved, 99)),
        1e3 * statistics.median(timed(policies, some)),
        1e3 * statistics.median(timed(revisions, some)),
        1e3 * statistics.median(timed(prefix, some)),
        1e3 * statistics.median(timed(tag, some)),
        1e3 * statistics.median(timed(owner, some)),
        1e3 * statistics.median(timed(score, some)),
        1e6 * statistics.median(timed(lambda index: store.get(digests[index]), range(NUM_PAGES))),
        promotions(catalog, at_random[:NUM_PROMOTED], seed),
    )


def timed(call: Callable[[int], object], indices: Sequence[int]) -> list[float]:
    """Seconds of each call."""
    found = []
    for index in indices:
        started_at = time.perf_counter()
        call(index)
        found.append(time.perf_counter() - started_at)
    return found


def promotions(catalog: Catalog, indices: Sequence[int], lap: int) -> float:
    """How many a second one caller makes, each of an alias that is new."""
    found = [catalog.resolve(tenant_of(index), address(index)).revision for index in indices]
    started_at = time.monotonic()
    for nth, revision in enumerate(found):
        tenant, policy, alias = revision.tenant, revision.policy_name, f"lap-{lap}-{nth}"
        catalog.promote(tenant, policy, alias, revision.digest, actor="benchmark")
    return len(found) / (time.monotonic() - started_at)


def answer(houses: Sequence[House], repeats: int) -> None:
    """Read from all of them in turns, then ask services on the smallest and the largest."""
    for house in houses:
        house.opened = [in_new_process(house) for _ in range(repeats)]
    open_ones = [Open(each, Catalog.open(each.url), FolderStore(each.folder)) for each in houses]
    for lap in range(-1, repeats):
        for each, resolved in zip(open_ones, resolve_in_turns(open_ones, lap + 1), strict=True):
            reads = read(each, resolved, lap + 1)
            if lap >= 0:
                each.house.reads.append(reads)
    for each in open_ones:
        each.catalog.close()
        print(f"  {each.house.size}: {each.house.reads[-1]}", flush=True)
    crowds = [Crowd(house.url, house.root) for house in (houses[0], houses[-1])]
    ask_in_turns(crowds, tenant_of(0), repeats)
    houses[0].crowd, houses[-1].crowd = crowds
    print(f"  {crowds}", flush=True)


def build(urls: Sequence[str], root: Path, size: int) -> list[House]:
    """One for each of the databases, all of them with the same store."""
    catalogs, store = [Catalog.open(url) for url in urls], FolderStore(root / "data")
    imports = fill(catalogs, store, size)
    for catalog in catalogs:
        mark(catalog, size)
        catalog.close()
    print(f"  {size}: {', '.join(f'{size / each.whole:.0f}/s' for each in imports)}", flush=True)
    return [
        House(size, url, root, imported, database_bytes(url) / 2**20)
        for url, imported in zip(urls, imports, strict=True)
    ]


def database_bytes(url: str) -> int:
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///"))
        return sum(each.stat().st_size for each in path.parent.glob(f"{path.name}*"))
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT pg_database_size(current_database())").fetchone()
        assert row is not None
        return int(row[0])


def into_page_cache(folder: Path) -> None:
    """Have the system hold a database's files: those that were written first have left memory for
    the bytes that were stored since."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


@dataclass(frozen=True)
class Databases:
    folder: Path
    """Of their files."""
    new_url: Callable[[int], str]
    """Gives the URL of an empty database for each size."""


@contextmanager
def databases_of(kind: str) -> Iterator[Databases]:
    """Raises Unavailable."""
    if kind == "SQLite":
        with tempfile.TemporaryDirectory(prefix="openmint-sqlite-") as folder:
            yield Databases(Path(folder), lambda size: f"sqlite:///{folder}/{size}.db")
        return
    binaries = find_binaries()
    if binaries is None:
        raise Unavailable("PostgreSQL's programs are not installed")
    with running_postgres(binaries) as server, ExitStack() as databases:
        yield Databases(
            server.folder / "data" / "base",
            lambda size: databases.enter_context(server.new_database()),
        )


def ask(stage: Stage, repeats: int) -> Report:
    """Of the stage the largest size alone is needed."""
    sizes = [size for size in SIZES if size <= stage.largest]
    limits = [
        "Bytes are admitted and stored once; each catalogue's import is those parts and its own.",
        "The databases' files are read once before; a page that has left memory costs a read of "
        "the disk more.",
        "PostgreSQL runs on the same machine, over a socket, with its default settings.",
    ]
    with ExitStack() as stack:
        databases: dict[str, Databases] = {}
        for kind in KINDS:
            try:
                databases[kind] = stack.enter_context(databases_of(kind))
            except Unavailable as error:
                limits.append(f"{kind} was not measured: {error}.")
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="openmint-catalogue-")))
        built = [
            build([each.new_url(size) for each in databases.values()], root / str(size), size)
            for size in sizes
        ]
        found = dict(zip(databases, map(list, zip(*built, strict=True)), strict=True))
        for kind, houses in found.items():
            print(f"  {kind}", flush=True)
            into_page_cache(databases[kind].folder)
            answer(houses, repeats)
    return Report(
        question="catalog",
        title=f"What {sizes[-1]:,} revisions cost the catalogue",
        measured=MEASURED,
        tables=[
            f"## {kind}\n\n{houses_table(houses)}\n\n{services_table(houses)}"
            for kind, houses in found.items()
        ],
        lines=[line for kind, houses in found.items() for line in lines_of(kind, houses)],
        limits=limits,
        data={kind: [data_of(house) for house in houses] for kind, houses in found.items()},
        versions={"catalogue": versions(("sqlalchemy", "psycopg", "numpy"))},
    )


def lines_of(kind: str, houses: Sequence[House]) -> list[Line]:
    """Largest against smallest, turn by turn."""
    first, last = houses[0], houses[-1]
    lines = []
    for name in ("resolve_p50_us", "resolve_p99_us"):
        pairs = zip(last.reads, first.reads, strict=True)
        ratio = Spread.of([getattr(large, name) / getattr(small, name) for large, small in pairs])
        what = name.split("_")[1]
        lines.append(
            Line(
                f"{kind}: resolve {what} at {last.size:,} / at {first.size:,}",
                f"≤ {MOST_RATIO:g}",
                ratio.show("x"),
                verdict(ratio.median, at_most=MOST_RATIO),
            )
        )
    warm = Spread.of([b / a for a, b in zip(_p95(first), _p95(last), strict=True)])
    lines.append(
        Line(
            f"{kind}: warm request p95 beside {last.size:,} / beside {first.size:,}",
            f"≤ {MOST_WARM_RATIO:g}",
            warm.show("x"),
            verdict(warm.median, at_most=MOST_WARM_RATIO),
        )
    )
    return lines


def _p95(house: House) -> list[float]:
    assert house.crowd is not None
    return house.crowd.p95_ms


def services_table(houses: Sequence[House]) -> str:
    head = ["revisions", "service ready, s", "gateway, MiB", "warm request p50, ms", "p95, ms"]
    return table(
        [head, *(_service_cells(house.size, house.crowd) for house in houses if house.crowd)]
    )


def _service_cells(size: int, crowd: Crowd) -> list[str]:
    spreads = (Spread.of(each).show("") for each in (crowd.p50_ms, crowd.p95_ms))
    ready = Spread.of(crowd.ready_seconds).show("")
    return [f"{size:,}", ready, number(crowd.gateway_mib), *spreads]


def houses_table(houses: Sequence[House]) -> str:
    head = [
        "revisions", "imported/s", "of it admission, store, catalogue, ms each", "database, MiB",
        "open, ms", "first answer, ms", "memory, MiB", "resolve p50, µs", "p99, µs",
        "page of policies, ms", "of revisions, ms", "by prefix, ms", "by tag, ms",
        "by owner, ms", "by score, ms", "bytes, µs", "promotions/s",
    ]  # fmt: skip
    return table([head, *([f"{house.size:,}", *_cells(house)] for house in houses)])


def _cells(house: House) -> list[str]:
    spent = house.imported
    parts = [1e3 * s / house.size for s in (spent.admission, spent.store, spent.catalogue)]
    return [
        number(house.size / spent.whole),
        ", ".join(number(part) for part in parts),
        number(house.database_mib),
        *(number(statistics.median(v)) for v in _columns(house.opened)),
        *(number(statistics.median(v)) for v in _columns(house.reads)),
    ]


def _columns(rows: Sequence[Opened] | Sequence[Reads]) -> list[list[float]]:
    return [list(column) for column in zip(*(asdict(row).values() for row in rows), strict=True)]


def data_of(house: House) -> dict[str, object]:
    return {
        "size": house.size,
        "imported": asdict(house.imported),
        "database_mib": house.database_mib,
        "opened": [asdict(each) for each in house.opened],
        "reads": [asdict(each) for each in house.reads],
        "service": None if house.crowd is None else _service_data(house.crowd),
    }


def _service_data(crowd: Crowd) -> dict[str, object]:
    return {
        "ready_seconds": crowd.ready_seconds,
        "gateway_mib": crowd.gateway_mib,
        "p50_ms": crowd.p50_ms,
        "p95_ms": crowd.p95_ms,
    }
