# Images of the agent (the default), and by --target: sandbox, tester, kamailio.
ARG PYTHON=python:3.12-slim-bookworm
ARG DEBIAN=debian:bookworm-slim

FROM ${PYTHON} AS build
WORKDIR /src
COPY setup.py pyproject.toml README.md LICENSE rating_agent_hep.py ./
RUN python -m venv /opt/agent \
    && /opt/agent/bin/pip install --no-cache-dir '.[rate,cluster]' \
    && /opt/agent/bin/pip uninstall --yes pip

# The sandbox needs more than the agent does.
FROM build AS build-sandbox
RUN python -m venv /opt/sandbox && /opt/sandbox/bin/pip install --no-cache-dir ".[sandbox]"

FROM ${PYTHON} AS sandbox
RUN useradd --system --user-group --uid 10001 --no-create-home rating \
    && install -d -o rating -g rating /var/lib/rating-sandbox
COPY --from=build-sandbox /opt/sandbox /opt/sandbox
COPY scripts/rating_sandbox.py /opt/sandbox/
USER 10001
VOLUME /var/lib/rating-sandbox
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD \
    ["/opt/sandbox/bin/python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/status', timeout=3)"]
ENTRYPOINT ["/opt/sandbox/bin/python", "/opt/sandbox/rating_sandbox.py", "--listen", "0.0.0.0:8000"]
CMD ["--database", "/var/lib/rating-sandbox/rating.sqlite"]

# Scenarios, and the carrier that they call: SIPp of Debian, which is the one of `make test`.
# The version is Debian's, pinned by the base image's release.
FROM ${PYTHON} AS tester
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends sip-tester \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --user-group --uid 10001 --no-create-home rating
COPY --from=build-sandbox /opt/sandbox /opt/sandbox
COPY scripts/run_scenario.py scripts/hep_replay.py /opt/tester/
COPY tests/scenarios /scenarios
USER 10001
WORKDIR /tmp
ENTRYPOINT ["/opt/sandbox/bin/python", "/opt/tester/run_scenario.py"]

FROM ${DEBIAN} AS kamailio
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends kamailio \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --user-group --uid 10001 --no-create-home rating
COPY conf/kamailio/kamailio.cfg /etc/kamailio/kamailio.cfg
USER 10001
EXPOSE 5060/udp
ENTRYPOINT ["/usr/sbin/kamailio", "-DD", "-E", "-m", "64", "-Y", "/tmp", "-f", "/etc/kamailio/kamailio.cfg"]

FROM ${PYTHON} AS agent
RUN useradd --system --user-group --uid 10001 --no-create-home rating \
    && install -d -o rating -g rating /var/lib/rating-agent-hep
COPY --from=build /opt/agent /opt/agent
COPY scripts/healthcheck.py /opt/agent/
USER 10001
ENV RATING_AGENT_HEP_STATE_DIR=/var/lib/rating-agent-hep \
    RATING_AGENT_HEP_LISTEN_STATUS=127.0.0.1:9061
VOLUME /var/lib/rating-agent-hep
EXPOSE 9060/tcp 9060/udp
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD \
    ["/opt/agent/bin/python", "/opt/agent/healthcheck.py"]
# No shell before it: the agent is the first process, so that SIGTERM of `docker stop` reaches it.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/agent/bin/rating-agent-hep"]
