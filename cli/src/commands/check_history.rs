//! `check-history`: checks that this build can still read the events of an export, and that its sagas still take the
//! same steps as recorded.

use std::{collections::HashMap, path::PathBuf};

use annals::saga::SagaEvent;
use clap::Args;
use serde::Serialize;

use crate::{
    domain::{Domain, SagaReplay},
    exported::{ExportItem, ExportReader},
    failure::{Failure, Verdict},
    output::{Output, grouped, shown},
};

/// The maximum number of findings to print. Further findings are only counted.
const PRINTED_MAX: u64 = 200;

#[derive(Debug, Args)]
#[command(after_help = "Example:
  my-service ops check-history --against production.ndjson.zst
      in CI: exit code 1 if this build cannot read an event, or if a saga would take other steps

The command needs the service's own binary, which knows the events and sagas of the service. A saga under another definition is
reported as such.")]
pub(crate) struct CheckHistoryArgs {
    /// A file that `export` wrote.
    #[arg(long, value_name = "FILE")]
    against: PathBuf,
}

#[derive(Serialize)]
struct Finding {
    #[serde(rename = "where")]
    place: String,
    what: String,
}

#[derive(Serialize)]
struct Checked {
    events: u64,
    sagas: u64,
    findings: u64,
}

pub(crate) fn run(arguments: CheckHistoryArgs, domain: &Domain, output: &mut Output) -> Result<Verdict, Failure> {
    let mut reader = ExportReader::open(&arguments.against)?;
    let mut checked = Checked { events: 0, sagas: 0, findings: 0 };
    // The sagas that have not ended. `None` stands for a saga with a finding: its later events are not checked, because
    // they would only repeat that finding.
    let mut sagas: HashMap<String, Option<Box<dyn SagaReplay>>> = HashMap::new();
    let complete = loop {
        let event = match reader.step()? {
            ExportItem::Event(event) => event.recorded(),
            ExportItem::Document(_) => continue,
            ExportItem::Section(section) if section.complete => break true,
            ExportItem::Section(_) => continue,
            ExportItem::End => break false,
        };
        checked.events += 1;
        let place = || format!("position {} ({} v{})", event.position, event.stream, event.version);
        if let Some(what) = domain.unreadable(&event) {
            report(place(), what, &mut checked, output)?;
            continue;
        }
        let Ok(Some(of_saga)) = event.decode::<SagaEvent>() else { continue };
        let known = sagas.entry(event.stream.to_string()).or_insert_with(|| {
            checked.sagas += 1;
            domain.replay(&event.stream)
        });
        let ended = of_saga.progress().ended.is_some();
        if let Some(Err(what)) = known.as_mut().map(|replay| replay.event(&event, &of_saga)) {
            *known = None;
            report(place(), what, &mut checked, output)?;
        }
        if ended {
            sagas.remove(event.stream.as_str());
        }
    };
    if !complete {
        return Err(Failure::new(format!(
            "{} is incomplete: continue the file with `export --resume`",
            arguments.against.display()
        )));
    }
    if output.json {
        output.value(&checked)?;
    } else {
        let Checked { events, sagas, findings } = &checked;
        let findings =
            if *findings == 1 { "1 finding".to_owned() } else { format!("{} findings", grouped(*findings as i64)) };
        output.line(&format!(
            "{} events and {} sagas checked: {findings}",
            grouped(*events as i64),
            grouped(*sagas as i64)
        ))?;
    }
    Ok(if checked.findings == 0 { Verdict::Fine } else { Verdict::Fault })
}

fn report(place: String, what: String, checked: &mut Checked, output: &mut Output) -> Result<(), Failure> {
    checked.findings += 1;
    if checked.findings > PRINTED_MAX {
        return Ok(());
    }
    if output.json {
        return output.value(&Finding { place, what });
    }
    output.line(&shown(&format!("{place}: {what}")).replace('\n', " "))
}
