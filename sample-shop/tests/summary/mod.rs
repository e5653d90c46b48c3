//! The summary that a run prints at its end.
#![allow(clippy::unwrap_used)]

use std::process::Output;

use serde_json::Value;

/// Returns the last line without the fields that differ from run to run.
pub fn business(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let mut line: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    for changing in ["seconds", "sagas_per_second", "latency_ms", "store"] {
        assert!(line.as_object_mut().unwrap().remove(changing).is_some(), "the line lacks {changing}");
    }
    line
}
