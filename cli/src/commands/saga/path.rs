//! The way one saga took, as a drawing.

use std::fmt::Write;

use annals::saga::{At, Outcome, Progress, SagaEvent, Status};

use super::timeline::named;

/// A step that the saga came to.
struct Stop {
    at: At,
    step: String,
    attempts: u32,
    /// Why it went on from there the way it did, where that was not because it was done.
    trouble: Option<&'static str>,
}

/// A [Mermaid](https://mermaid.js.org) flowchart: solid arrows go forward, dashed ones back.
pub(crate) fn mermaid<'a>(events: impl Iterator<Item = &'a SagaEvent>) -> String {
    let mut stops: Vec<Stop> = Vec::new();
    let mut last: Option<&Progress> = None;
    for event in events {
        let progress = event.progress();
        if let Some(stop) = stops.last_mut() {
            stop.trouble = trouble(event).or(stop.trouble);
        }
        match stops.last_mut() {
            Some(stop) if stop.at == progress.at => stop.attempts = stop.attempts.max(progress.attempt),
            _ => {
                let (at, step) = (progress.at, progress.step.clone());
                stops.push(Stop { at, step, attempts: progress.attempt, trouble: None });
            }
        }
        last = Some(progress);
    }
    let mut text = "flowchart LR\n".to_owned();
    let Some(last) = last else { return text };
    let mut from = "start((\" \"))".to_owned();
    let mut line = |line: &str| _ = writeln!(text, "    {line}");
    let mut reason = None;
    for (number, stop) in stops.iter().enumerate() {
        let attempts = if stop.attempts > 1 { format!("<br/>{} attempts", stop.attempts) } else { String::new() };
        let label = label(&named(stop.at, &stop.step), &attempts);
        line(&format!("{from} {} n{number}[{label}]", arrow(stop.at, reason)));
        (from, reason) = (format!("n{number}"), stop.trouble);
    }
    let back = matches!(last.status, Status::Compensating | Status::Compensated);
    let end = match (last.status, last.ended) {
        (Status::Completed, _) => Some("completed"),
        (Status::Compensated, _) => Some("compensated"),
        (Status::Stuck, Some(_)) => Some("abandoned"),
        (Status::Stuck, None) => Some("stuck"),
        (Status::Running | Status::Compensating, _) => None,
    };
    if let Some(end) = end {
        let arrow = if back { "-.->" } else { "-->" };
        line(&format!("{from} {arrow} {end}([\"{end}\"])"));
    } else {
        line("classDef waiting stroke-dasharray: 4 4");
        line(&format!("class {from} waiting"));
    }
    text
}

fn arrow(to: At, reason: Option<&str>) -> String {
    match (to, reason) {
        (At::Forward(_), None) => "-->".to_owned(),
        (At::Forward(_), Some(reason)) => format!("-- {reason} -->"),
        (_, None) => "-.->".to_owned(),
        (_, Some(reason)) => format!("-. {reason} .->"),
    }
}

fn trouble(event: &SagaEvent) -> Option<&'static str> {
    match event {
        SagaEvent::Replied { gave_up: Some(_), .. } | SagaEvent::Timed { gave_up: Some(_), .. } => Some("given up"),
        SagaEvent::Replied { reply, .. } if matches!(reply.outcome, Outcome::Refused(_)) => Some("refused"),
        SagaEvent::Operated { .. } => Some("operator"),
        _ => None,
    }
}

/// Quoted as Mermaid wants it; `suffix` is markup of our own.
fn label(text: &str, suffix: &str) -> String {
    let mut escaped = "\"".to_owned();
    for character in text.chars() {
        match character {
            '"' => escaped += "#quot;",
            '#' | '&' | '<' | '>' | '`' | '\\' => _ = write!(escaped, "#{};", u32::from(character)),
            plain => escaped.push(plain),
        }
    }
    escaped + suffix + "\""
}
