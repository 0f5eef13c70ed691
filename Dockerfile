# For machines with NVIDIA GPUs. Untried: it has not been built yet.
#   docker build -t cytoclip .
#   docker run --gpus all --ipc host --user "$(id -u)" -e HOME=/tmp -v "$PWD":/work cytoclip train my.yaml
# --ipc host: loader processes hand batches over in shared memory, of which a container has 64 MB by default.
FROM pytorch/pytorch:2.9.1-cuda13.0-cudnn9-runtime
WORKDIR /opt/cytoclip
COPY pyproject.toml README.md LICENSE ./
COPY src src
# The image's torch stays: it is in the ranges of pyproject.toml.
RUN pip install --no-cache-dir '.[all]'
WORKDIR /work
ENTRYPOINT ["cytoclip"]
CMD ["--help"]
