//! The shop offers the `annals` command as one of its own subcommands.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

fn shop(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sample-shop")).args(words).env_remove("ANNALS_STORE").output().unwrap()
}

/// The result of a run, without its duration.
fn line(output: &Output) -> [String; 3] {
    let line: serde_json::Value = serde_json::from_str(text(output)).unwrap();
    ["confirmed", "cancelled", "charged"].map(|field| line[field].to_string())
}

fn text(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

#[test]
fn ops_command_inspects_and_verifies_a_shop_store() {
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

#[test]
fn half_imported_store_is_not_served_until_complete() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let from = format!("sqlite:{}", path("shop.db"));
    let to = format!("sqlite:{}", path("moved.db"));
    let said = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let ran = shop(&["run", "--generate", "600", "--quiet", "--json", "--store", &from]);
    assert!(ran.status.success(), "{}", said(&ran));
    let whole = path("whole.ndjson");
    let cut = path("cut.ndjson");
    assert!(shop(&["ops", "export", &whole, "--store", &from]).status.success());
    let lines = std::fs::read_to_string(&whole).unwrap();
    let kept: Vec<_> = lines.lines().take(lines.lines().count() * 9 / 10).collect();
    std::fs::write(&cut, kept.join("\n") + "\n").unwrap();

    assert!(shop(&["ops", "migrate", "--store", &to]).status.success());
    let half = shop(&["ops", "import", &cut, "--store", &to]);
    assert!(half.status.code() == Some(2) && said(&half).contains("is incomplete"), "{}", said(&half));
    let history = |store: &str| text(&shop(&["ops", "replay", "--store", store])).to_owned();
    let before = history(&to);
    assert!(!before.is_empty() && history(&from).starts_with(&before));
    for words in
        [["run", "--generate", "1", "--store", &to].as_slice(), &["serve", "all", "--bus", "local:", "--store", &to]]
    {
        let refused = shop(words);
        assert!(
            !refused.status.success() && said(&refused).contains("the import into the store is not complete"),
            "{}",
            said(&refused)
        );
    }
    assert_eq!(history(&to), before);

    let rest = shop(&["ops", "import", &whole, "--store", &to]);
    assert!(rest.status.success(), "{}", said(&rest));
    assert_eq!(history(&to), history(&from));
    let again = shop(&["run", "--generate", "600", "--quiet", "--json", "--store", &to]);
    assert!(again.status.success(), "{}", said(&again));
    assert_eq!(line(&again), line(&ran));
}
