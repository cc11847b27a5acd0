# Environment of every rank, sourced by the launch scripts; each line says why. A value that is already set wins.

# The program that runs Python on a node, in the batch script and in every rank: "${python[@]}". A PYTHON that you set may
# be several words, for a container is a prefix; the one that is found here is one word, whatever blanks are in its path:
#   PYTHON="apptainer exec --nv --bind /data pretrain.sif python"
if [[ -n ${PYTHON:-} ]]; then read -ra python <<< "$PYTHON"
elif [[ -e $REPO/.venv/pyvenv.cfg ]]; then python=("$REPO/.venv/bin/python")
# Not an environment but a link into one: called through the link, Python would not find that one's packages.
elif [[ -x $REPO/.venv/bin/python && $(readlink "$REPO/.venv/bin/python") == /* ]]; then
  python=("$(readlink "$REPO/.venv/bin/python")")
elif [[ -x $REPO/.venv/bin/python ]]; then python=("$REPO/.venv/bin/python")
else python=(python3)
fi

# The package is found from any working directory: relative paths mean what they mean in your shell.
export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}
# Lines of a rank that is killed are in the log.
export PYTHONUNBUFFERED=1
# A crash inside a library prints the Python stack that led there.
export PYTHONFAULTHANDLER=1

# One thread pool a rank, as large as its share of the node (the launch scripts know it): CPU training, optimizer
# offload.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# The tokenizer's threads do not survive forks, and ranks do not tokenize.
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# One hardware queue keeps kernels in the order of their launch; tensor and sequence parallelism overlap
# communication with computation only then (megatron-core).
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Segments that grow instead of new ones: variable sizes (ramps, documents) do not fragment the device's memory.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# NCCL says which link or device failed; its default is silence.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Nodes with several networks: name the one between nodes, e.g. NCCL_SOCKET_IFNAME=bond0 GLOO_SOCKET_IFNAME=bond0.
