# What CI runs. `.ci/run` reads the recipes from this file, so `just` is a convenience and the two cannot drift.

set shell := ["bash", "-euo", "pipefail", "-c"]

# Everything CI runs, in its order.
ci: fmt clippy doc deny test

fmt:
    cargo fmt --all --check

# The one feature that is left out, `tls` of the Kafka bus, builds OpenSSL from source for minutes and has no code of ours,
# but for a test: cargo test -p annals-kafka --features tls.
clippy:
    cargo clippy --workspace --all-targets --features annals/testing -- -D warnings

doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --features annals/testing --no-deps

# The advisories need the network; the other checks do not.
deny:
    if ! cargo deny --version 2>/dev/null; then echo "cargo-deny is not installed: the dependencies were NOT checked"; \
    elif cargo deny fetch db; then cargo deny check; \
    else echo "the advisory database cannot be fetched: advisories were NOT checked"; cargo deny check bans licenses sources; fi

test:
    ./test

# Not part of `ci`: figures from a busy machine say nothing.
bench:
    cargo run --release --package annals-bench
