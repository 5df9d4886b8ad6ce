# The server on a CPU, in two steps: a C++ compiler builds the kernels, the image that runs has none.
#   docker build -t audioflamingo .
#   docker run -p 8000:8000 -e AF3_API_KEY=... audioflamingo
#   docker run -p 8000:8000 -e AF3_API_KEY=... -v "$PWD/checkpoint:/model:ro" audioflamingo --model /model --quantization int4
FROM python:3.11-slim AS build
# Where torch's CPU wheels are, if the default index serves those with gigabytes of CUDA.
ARG PIP_EXTRA_INDEX_URL
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN python -m venv /opt/af3 \
    && /opt/af3/bin/pip install --no-cache-dir --constraint /source/constraints.txt '/source[server,structured]'

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home af3
COPY --from=build /opt/af3 /opt/af3
ENV PATH=/opt/af3/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/af3
EXPOSE 8000
# A model of 16 GB takes a while to load; until then the server answers nothing.
HEALTHCHECK --start-period=10m --interval=30s --timeout=5s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["af3", "serve", "--host", "0.0.0.0"]
