# The steps of CI. `.ci/run` reads the recipes from this file, so `just` is a convenience and the two cannot differ.

set shell := ["bash", "-euo", "pipefail", "-c"]

# All steps of CI, in order.
ci: fmt spell clippy doc deny package test

fmt:
    cargo fmt --all --check

# Looks for misspelt words in all files; `_typos.toml` lists the exceptions. Takes the published program of `typos` with
# pip, and builds it only where pip cannot, because the build takes minutes and the check takes a second.
spell:
    typos="${CARGO_TARGET_DIR:-target}/tools/typos-1.52.0"; \
    if [[ ! -x $typos/bin/typos ]]; then \
        python3 -m pip install --quiet --no-deps --target "$typos" typos==1.52.0 || \
            cargo install --quiet --locked --profile dev --root "$typos" typos-cli@1.52.0; \
    fi; \
    "$typos/bin/typos"

clippy:
    cargo clippy --workspace --all-targets --features annals/testing -- -D warnings

# Uses TLS as the tests do; otherwise librdkafka would be built twice.
doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --features annals/testing,annals-kafka/tls --no-deps

# Builds cargo-deny once and keeps it in the target folder. Not optimized, because the build takes longer than all checks.
# Only the advisories need the network.
deny:
    CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --locked --profile dev --root "${CARGO_TARGET_DIR:-target}/tools" --target-dir "${CARGO_TARGET_DIR:-target}/tools/build" cargo-deny@0.20.2
    PATH="$(realpath "${CARGO_TARGET_DIR:-target}")/tools/bin:$PATH"; \
    if cargo deny fetch db; then cargo deny check; \
    else echo "the advisory database cannot be fetched: advisories were NOT checked"; cargo deny check bans licenses sources; fi

# Makes the archives of all packages that are published, in the order of their dependencies, and checks what a registry
# checks. Does not compile the archives: CONTRIBUTING.md has the command that does.
package:
    cargo publish --workspace --dry-run --no-verify --allow-dirty

test:
    ./test --no-fail-fast

# Not part of `ci`: figures from a busy machine mean nothing.
bench:
    cargo run --profile dist --package annals-bench
