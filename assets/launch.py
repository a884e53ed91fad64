"""Choose where a stage runs when Dagster asks for it: in the step itself, in a child process, over torchrun's ranks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from functools import cache

import dagster as dg
from dagster._core.errors import DagsterExecutionInterruptedError

from assets.launchpad import Chosen
from assets.pipes_main import unpack
from prts_core.io.errors import Stopped
from prts_core.launch.children import STOP_LIMIT_S
from prts_core.launch.signals import stop_on_signals
from prts_core.launch.where import INLINE, Launch, parse_launch
from prts_core.stages import chain
from prts_core.store.manifest import MANIFEST, Manifest, entry_folder
from prts_core.store.stage import Stage

STOPPED = "stopped on request; training has left a checkpoint, and the same again goes on from there"


class Crashed(Exception):
    """The process that ran a stage was killed from outside; the same again goes on from its checkpoint."""


@dataclass(frozen=True)
class Launcher:
    """Where stages run. A stop from the page (or Ctrl-C) reaches them as a signal; they leave a checkpoint.

    default: inline (in the step), process (in a child of it), torchrun:N (over N ranks, stages that train). stages:
    another choice for one stage. grace_s: seconds that a stopped stage has. command: what a child runs.
    """

    default: str = "process"
    stages: dict[str, str] = field(default_factory=dict)
    grace_s: float = STOP_LIMIT_S + 30.0  # a launched stage ends itself before
    command: tuple[str, ...] = (sys.executable, "-m", "assets.pipes_main")

    def run(
        self,
        context: dg.AssetExecutionContext,
        stage: Stage,
        chosen: Chosen,
        partition: str | None,
        caller: dict[str, str],
    ) -> Manifest:
        """The stage's result. PrtsErrors as `chain.run` raises them; Crashed where its process was killed."""
        _stop_with_run()
        where = parse_launch(self.stages.get(stage.name, self.default))
        if where.kind == "torchrun" and not stage.trains:
            where = Launch("process")
        if where == INLINE:
            try:
                with stop_on_signals():
                    return chain.run(stage.name, chosen.load(), partition, chosen.outputs, caller=caller, launch=INLINE)
            except Stopped as err:
                context.log.warning(str(err))
                raise DagsterExecutionInterruptedError(str(err)) from err
        return self._child(context, stage, chosen, partition, caller, str(where))

    def _child(
        self,
        context: dg.AssetExecutionContext,
        stage: Stage,
        chosen: Chosen,
        partition: str | None,
        caller: dict[str, str],
        where: str,
    ) -> Manifest:
        asked = {
            "stage": stage.name,
            "partition": partition,
            "config": str(chosen.path),
            "outputs": str(chosen.outputs),
            "overrides": list(chosen.overrides),
            "caller": caller,
            "launch": where,
        }
        with dg.open_pipes_session(
            context, dg.PipesTempFileContextInjector(), dg.PipesTempFileMessageReader(), extras=asked
        ) as session:
            child = subprocess.Popen(
                self.command, env=os.environ | session.get_bootstrap_env_vars(), start_new_session=True
            )
            try:
                status = child.wait()
            except BaseException:
                context.log.warning(f"stopping {stage.name}: it leaves a checkpoint first")
                self._stop(child)
                raise
        # A skip yields nothing, which Dagster takes for a forgotten result once Pipes was open.
        context.op_execution_context._step_execution_context._requires_typed_event_stream = False
        told = {key: value for message in session.get_custom_messages() for key, value in message.items()}
        if status == 0:
            return Manifest.load(entry_folder(chosen.outputs, stage.name, told["key"]) / MANIFEST)
        if "error" in told:
            raise unpack(told["error"])
        raise Crashed(f"the process of stage {stage.name!r} was killed ({_how(status)}); its log says more")

    def _stop(self, child: subprocess.Popen[bytes]) -> None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(self.grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


@cache
def _stop_with_run() -> None:
    """Stop this step, and by that its child, when the run's own process is killed: nobody would hear of its result, and
    the run that is tried again would wait for it."""
    run = multiprocessing.parent_process()
    if run is None:
        return

    def wait() -> None:
        run.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="run", daemon=True).start()


def _how(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def launch_resource(launcher: Launcher) -> dg.ResourceDefinition:
    """The launcher as a resource; on the launchpad a run may choose where its stages run."""
    schema = {
        "default": dg.Field(str, default_value=launcher.default, description="inline, process or torchrun:N"),
        "stages": dg.Field(dict, default_value=launcher.stages, description="for one stage: {pretrain: torchrun:8}"),
        "grace_s": dg.Field(float, default_value=launcher.grace_s, description="seconds for the last checkpoint"),
    }
    return dg.ResourceDefinition(lambda context: replace(launcher, **context.resource_config), config_schema=schema)
