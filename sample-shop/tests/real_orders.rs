//! The main job on the real orders of December 2010.
#![allow(clippy::unwrap_used)]

use std::{path::PathBuf, process::Command};

use serde_json::{Value, json};

fn run(arguments: &[&str]) -> Value {
    let orders = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/online-retail-2010-12.csv");
    assert!(orders.is_file(), "{} is missing: the data belongs beside the checkout", orders.display());
    let directory = tempfile::tempdir().unwrap();
    let store = format!("sqlite:{}", directory.path().join("shop.db").display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
    command.args(["run", "--json", "--store", &store, "--orders"]).arg(orders).args(arguments);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let mut line: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    for changing in ["seconds", "sagas_per_second", "latency_ms", "store"] {
        assert!(line.as_object_mut().unwrap().remove(changing).is_some(), "the line lacks {changing}");
    }
    line
}

#[test]
fn with_plenty_of_stock_every_order_is_confirmed() {
    let expected = json!({
        "orders": 1595, "confirmed": 1595,
        "cancelled": {"out_of_stock": 0, "declined": 0, "by_customer": 0},
        "returns": 333, "adjustments": 154, "stuck": 0,
        "charged": "839772.22", "refunded": "75864.72",
        "units": {"initial": 559_756, "sold": 368_150, "returned": 16_274, "adjusted": -1_709, "remaining": 206_171, "reserved": 0},
        "bus": "local:",
    });
    assert_eq!(run(&["--stock-factor", "1.5", "--decline-rate", "0"]), expected);
}

#[test]
fn with_too_little_stock_a_seed_gives_the_same_business_twice() {
    let arguments = ["--stock-factor", "0.7", "--decline-rate", "0.1", "--cancel-rate", "0.05", "--seed", "7"];
    let first = run(&arguments);
    let cancelled =
        ["out_of_stock", "declined", "by_customer"].map(|reason| first["cancelled"][reason].as_u64().unwrap());
    assert!(cancelled.iter().all(|count| *count > 0), "{first}");
    assert_eq!(first["confirmed"].as_u64().unwrap() + cancelled.iter().sum::<u64>(), 1595, "{first}");
    let units = |name: &str| first["units"][name].as_i64().unwrap();
    assert_eq!((first["stuck"].as_u64(), units("reserved")), (Some(0), 0), "{first}");
    assert_eq!(units("initial") - units("sold") + units("returned") + units("adjusted"), units("remaining"), "{first}");
    assert_eq!(run(&arguments), first);
}
