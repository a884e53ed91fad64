#!/usr/bin/env bash
# `make ui`: Dagster's and MLflow's web pages on the state that `make demo` left, for this machine only. Ctrl-C stops both.
set -euo pipefail
cd "$(dirname "$0")/.."
dagster_port=${PRTS_DAGSTER_PORT:-3000} mlflow_port=${PRTS_MLFLOW_PORT:-5000}
outputs=$(realpath -m "${PRTS_OUTPUTS:-outputs}")
mkdir -p "$DAGSTER_HOME" "$outputs/mlartifacts"
[ -e "$DAGSTER_HOME/dagster.yaml" ] || cp pipelines/dagster.yaml "$DAGSTER_HOME/dagster.yaml"

children=()
stop() { trap - EXIT INT TERM; kill -INT "${children[@]}" 2>/dev/null || true; wait "${children[@]}" 2>/dev/null || true; }
trap stop EXIT INT TERM

.venv/bin/mlflow server --host 127.0.0.1 --port "$mlflow_port" --workers 1 \
  --backend-store-uri "sqlite:///$outputs/mlflow.db" --artifacts-destination "$outputs/mlartifacts" \
  >"$outputs/mlflow-server.log" 2>&1 &
children+=($!)
.venv/bin/dagster dev --host 127.0.0.1 --port "$dagster_port" >"$outputs/dagster-dev.log" 2>&1 &
children+=($!)

echo "starting (10-20 s); logs: $outputs/mlflow-server.log, $outputs/dagster-dev.log"
answers() { .venv/bin/python -c "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=2)" "$1" 2>/dev/null; }
for url in "http://127.0.0.1:$mlflow_port" "http://127.0.0.1:$dagster_port"; do
  until answers "$url"; do
    for child in "${children[@]}"; do
      kill -0 "$child" 2>/dev/null || { tail -n 5 "$outputs"/mlflow-server.log "$outputs"/dagster-dev.log >&2; echo "error: a server stopped; its last lines stand above" >&2; exit 1; }
    done
    sleep 1
  done
done
echo "Dagster  http://127.0.0.1:$dagster_port"
echo "MLflow   http://127.0.0.1:$mlflow_port"
echo "Ctrl-C stops both"
wait -n "${children[@]}" || true
