//! Two shops on one file would wait for each other's messages. Therefore the second shop is rejected, and the error
//! names the remedy.
#![allow(clippy::unwrap_used)]

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

fn shop(arguments: &[&str], store: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
    command.args(arguments).args(["--json", "--quiet", "--store", &format!("sqlite:{}", store.display())]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Starts a shop, and waits until its process id is in the lock file next to the store.
fn start(store: &Path) -> Child {
    let child = shop(&["run", "--generate", "30000"], store).spawn().unwrap();
    let number = child.id().to_string();
    let started = Instant::now();
    while std::fs::read_to_string(store.with_extension("db-lock")).ok() != Some(number.clone()) {
        assert!(started.elapsed() < Duration::from_secs(60), "the process never claims the store");
        std::thread::sleep(Duration::from_millis(3));
    }
    child
}

#[test]
fn second_run_is_refused_until_the_first_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("shop.db");
    let mut first = start(&store);
    for arguments in [&["run", "--generate", "10"][..], &["drain"]] {
        let second = shop(arguments, &store).output().unwrap();
        let said = String::from_utf8_lossy(&second.stderr);
        assert_eq!(second.status.code(), Some(2), "{said}");
        let expected = format!(
            "sample-shop: sqlite:{} is in use by another sample-shop (process {}): wait until it ends, or name another \
             --store\n",
            store.display(),
            first.id()
        );
        assert_eq!(said, expected);
    }
    // A symbolic link is another name of the same file.
    #[cfg(unix)]
    {
        let other = folder.path().join("other.db");
        std::os::unix::fs::symlink(&store, &other).unwrap();
        assert_eq!(shop(&["drain"], &other).output().unwrap().status.code(), Some(2));
    }
    // A shop that is killed releases its claim.
    first.kill().unwrap();
    first.wait().unwrap();
    let drained = shop(&["drain"], &store).output().unwrap();
    assert!(drained.status.success(), "{}", String::from_utf8_lossy(&drained.stderr));
}

#[test]
fn runs_on_other_stores_are_not_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = start(&folder.path().join("shop.db"));
    let second = shop(&["run", "--generate", "10"], &folder.path().join("second.db")).output().unwrap();
    assert!(second.status.success(), "{}", String::from_utf8_lossy(&second.stderr));
    first.kill().unwrap();
    first.wait().unwrap();
}
