# What CI runs. `.ci/run` reads the recipes from this file, so `just` is a convenience and the two cannot drift.

set shell := ["bash", "-euo", "pipefail", "-c"]

# Everything CI runs, in its order.
ci: fmt clippy doc deny test

fmt:
    cargo fmt --all --check

clippy:
    cargo clippy --workspace --all-targets --features annals/testing -- -D warnings

# With TLS as tests have it, or librdkafka would be built twice.
doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --features annals/testing,annals-kafka/tls --no-deps

# cargo-deny is built once and kept with the build. The advisories need the network; the other checks do not.
deny:
    cargo install --quiet --locked --root "${CARGO_TARGET_DIR:-target}/tools" --target-dir "${CARGO_TARGET_DIR:-target}/tools/build" cargo-deny@0.20.2
    PATH="$(realpath "${CARGO_TARGET_DIR:-target}")/tools/bin:$PATH"; \
    if cargo deny fetch db; then cargo deny check; \
    else echo "the advisory database cannot be fetched: advisories were NOT checked"; cargo deny check bans licenses sources; fi

test:
    ./test

# Not part of `ci`: figures from a busy machine say nothing.
bench:
    cargo run --release --package annals-bench
