//! The shop has the `annals` command under its own name.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

fn shop(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sample-shop")).args(words).env_remove("ANNALS_STORE").output().unwrap()
}

fn text(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

#[test]
fn a_store_of_the_shop_is_looked_at_and_verified() {
    let folder = tempfile::tempdir().unwrap();
    let store = format!("sqlite:{}", folder.path().join("shop.db").display());
    let ran = shop(&["run", "--generate", "60", "--quiet", "--json", "--store", &store]);
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let sagas = shop(&["ops", "sagas", "--store", &store, "--json"]);
    assert_eq!(text(&sagas).lines().count(), 60);
    let verified = shop(&["ops", "verify", "--store", &store]);
    assert_eq!(verified.status.code(), Some(0), "{}", text(&verified));
    assert!(text(&verified).contains(" 60 sagas and "), "{}", text(&verified));
    let file = folder.path().join("shop.ndjson.zst").display().to_string();
    let exported = shop(&["ops", "export", &file, "--store", &store]);
    assert!(exported.status.success(), "{}", String::from_utf8_lossy(&exported.stderr));
    let checked = shop(&["ops", "check-history", "--against", &file]);
    assert_eq!(checked.status.code(), Some(0), "{}", text(&checked));
    assert!(text(&checked).ends_with(" events and 60 sagas checked: 0 findings\n"), "{}", text(&checked));
    let missing = shop(&["ops", "streams", "--store", "sqlite:nowhere.db"]);
    assert_eq!(missing.status.code(), Some(2));
    assert!(
        String::from_utf8_lossy(&missing.stderr)
            .starts_with("sample-shop ops: sqlite:nowhere.db: there is no such store")
    );
    let help = shop(&["ops", "--help"]);
    assert!(help.status.success() && text(&help).contains("Usage: sample-shop ops"), "{}", text(&help));
}
