//! Draws the path that one saga took.

use std::{fmt::Write, mem::discriminant};

use super::{
    diagram::{BOX, Canvas, GAP, MARGIN, TIP, box_width, mermaid_text},
    progress::{BY_ITSELF, Outcome, Progress, SagaEvent, Status, StepRef},
};

/// The distance between two boxes if the arrow between them is labelled with a reason.
const WIDE_GAP: i32 = 2 * GAP;

/// The path that one saga took, drawn from its events: the steps that it reached, in order, and the reason why it went
/// back.
///
/// ```
/// # use annals::saga::Path;
/// assert_eq!(Path::of(&[]).mermaid(), "flowchart LR\n");
/// assert!(Path::of(&[]).svg("order 1").starts_with("<svg xmlns="));
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Path {
    stops: Vec<PathStop>,
    /// How the saga ended; `None` while the saga waits at the last step of the path.
    end: Option<&'static str>,
    went_back: bool,
}

/// A step that the saga reached.
#[derive(Clone, Debug, PartialEq)]
struct PathStop {
    at: StepRef,
    step: String,
    name: String,
    attempts: u32,
    /// Why the saga left this step, unless the step was done.
    trouble: Option<&'static str>,
}

impl Path {
    /// Returns the path that the events of one saga describe. The events must start with the first event of the saga.
    pub fn of<'a>(events: impl IntoIterator<Item = &'a SagaEvent>) -> Self {
        let mut stops: Vec<PathStop> = Vec::new();
        let mut last: Option<&Progress> = None;
        for event in events {
            let progress = event.progress();
            if let Some(stop) = stops.last_mut() {
                stop.trouble = trouble(event).or(stop.trouble);
            }
            match stops.last_mut() {
                // A migration to another plan may have changed the place of the same step.
                Some(stop) if discriminant(&stop.at) == discriminant(&progress.at) && stop.step == progress.step => {
                    stop.attempts = stop.attempts.max(progress.attempt)
                }
                _ => {
                    let undo = if matches!(progress.at, StepRef::Undo(_)) { "undo " } else { "" };
                    let name = format!("{undo}{}", progress.step.replace(char::is_control, " "));
                    let step = progress.step.clone();
                    stops.push(PathStop { at: progress.at, step, name, attempts: progress.attempt, trouble: None });
                }
            }
            last = Some(progress);
        }
        let end = last.and_then(|last| match (last.status, last.ended) {
            (Status::Completed, _) => Some("completed"),
            (Status::Compensated, _) => Some("compensated"),
            (Status::Stuck, Some(_)) => Some("abandoned"),
            (Status::Stuck, None) => Some("stuck"),
            (Status::Running | Status::Compensating, _) => None,
        });
        let went_back = last.is_some_and(|last| matches!(last.status, Status::Compensating | Status::Compensated));
        Self { stops, end, went_back }
    }

    /// Returns the path as a [Mermaid](https://mermaid.js.org) flowchart. Solid arrows go forward, and dashed arrows go
    /// back.
    pub fn mermaid(&self) -> String {
        let mut text = "flowchart LR\n".to_owned();
        if self.stops.is_empty() {
            return text;
        }
        let mut from = "start((\" \"))".to_owned();
        let mut line = |line: &str| _ = writeln!(text, "    {line}");
        let mut reason = None;
        for (number, stop) in self.stops.iter().enumerate() {
            let mut label = mermaid_text(&stop.name);
            if stop.attempts > 1 {
                label.truncate(label.len() - 1);
                _ = write!(label, "<br/>{} attempts\"", stop.attempts);
            }
            line(&format!("{from} {} n{number}[{label}]", arrow(stop.at, reason)));
            (from, reason) = (format!("n{number}"), stop.trouble);
        }
        if let Some(end) = self.end {
            let arrow = if self.went_back { "-.->" } else { "-->" };
            line(&format!("{from} {arrow} {end}([\"{end}\"])"));
        } else {
            line("classDef waiting stroke-dasharray: 4 4");
            line(&format!("class {from} waiting"));
        }
        text
    }

    /// Returns the path as a standalone SVG, which is readable on light and dark backgrounds. The path is one row from
    /// left to right. `name` is the title of the drawing.
    pub fn svg(&self, name: &str) -> String {
        let mut canvas = Canvas::default();
        let y = MARGIN;
        let mut x = canvas.dot(MARGIN, y);
        let mut reason = None;
        for stop in &self.stops {
            let attempts = if stop.attempts > 1 { format!("{} attempts", stop.attempts) } else { String::new() };
            let (line, class) = match stop.at {
                StepRef::Forward(_) => ("forward", "compensatable"),
                StepRef::Undo(_) => ("back", "undo"),
                StepRef::Closing(_) => ("back", "closing"),
            };
            x = step(&mut canvas, x, line, reason);
            let width = box_width(&stop.name, &attempts);
            canvas.node(x, y, width, class, &stop.name, &attempts);
            (x, reason) = (x + width, stop.trouble);
        }
        if let Some(end) = self.end {
            x = step(&mut canvas, x, if self.went_back { "back" } else { "forward" }, None);
            canvas.end(x, y, end);
        }
        canvas.finish(name)
    }
}

/// Draws an arrow to the next box. The label of the arrow is the reason, if there is one. Returns the left edge of the
/// next box.
fn step(canvas: &mut Canvas, x: i32, class: &str, reason: Option<&str>) -> i32 {
    let gap = if reason.is_some() { WIDE_GAP } else { GAP };
    canvas.arrow(&format!("M{x} {}h{}", MARGIN + BOX / 2, gap - TIP), class);
    if let Some(reason) = reason {
        canvas.note(x, MARGIN + BOX / 2 - TIP, reason);
    }
    x + gap
}

fn arrow(to: StepRef, reason: Option<&str>) -> String {
    match (to, reason) {
        (StepRef::Forward(_), None) => "-->".to_owned(),
        (StepRef::Forward(_), Some(reason)) => format!("-- {reason} -->"),
        (_, None) => "-.->".to_owned(),
        (_, Some(reason)) => format!("-. {reason} .->"),
    }
}

fn trouble(event: &SagaEvent) -> Option<&'static str> {
    match event {
        SagaEvent::Replied { gave_up: Some(_), .. } | SagaEvent::Timed { gave_up: Some(_), .. } => Some("given up"),
        SagaEvent::Replied { reply, .. } if matches!(reply.outcome, Outcome::Refused(_)) => Some("refused"),
        SagaEvent::Operated { by, .. } => Some(if by == BY_ITSELF { "late answer" } else { "operator" }),
        _ => None,
    }
}
