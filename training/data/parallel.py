"""Work spread over the processes of a machine or a Dask cluster."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import joblib


CONNECT_SECONDS = 20


def run_parallel(
    function: Callable[..., Any], work: Iterable[tuple], jobs: int = 1, scheduler: str | None = None
) -> Iterator[Any]:
    """
    Results of the function in the order of its arguments, as they come; of the arguments, few are drawn ahead.

    jobs: processes on this machine, -1 for one per core. scheduler: address of a Dask cluster to use instead; the
    work is sent to it, so its workers need this package and no common files.
    """
    with ExitStack() as stack:
        if scheduler is not None:
            try:
                from distributed import Client
            except ImportError as error:
                raise ValueError("a Dask cluster needs distributed: pip install 'fmri-lm[cluster]'") from error
            try:
                stack.enter_context(Client(scheduler, timeout=CONNECT_SECONDS))
            except OSError as error:
                raise ValueError(f"no Dask scheduler answers at {scheduler}") from error
            stack.enter_context(joblib.parallel_config(backend="dask"))
        elif jobs != 1:
            stack.enter_context(joblib.parallel_config(backend="loky", n_jobs=jobs, inner_max_num_threads=1))
        yield from joblib.Parallel(return_as="generator")(joblib.delayed(function)(*item) for item in work)
