//! `replay`: sends a range of the log again, to a target that the operator chooses.

mod arguments;
mod handler;
mod pass;
mod target;
mod topic;

use annals::{Archive, Position, StoreError};

pub(crate) use self::arguments::ReplayArgs;
use self::{handler::HandlerTarget, pass::Pass, target::Target, topic::TopicTarget};
use crate::{
    domain::Domain,
    failure::{Failure, Verdict},
    moment::Moment,
    output::{Output, grouped},
    place::position_at,
    progress,
    resume_command::ResumeCommand,
    stop::Stop,
    store::Store,
};

pub(crate) async fn run(
    arguments: ReplayArgs,
    store: &Store,
    domain: &Domain,
    resume: &ResumeCommand,
    output: &mut Output,
) -> Result<Verdict, Failure> {
    let (first, mut last) = range(&arguments, &*store.port()).await?;
    let mut target = open(&arguments, store, domain, output).await?;
    if let Some(sent) = target.sent().filter(|sent| *sent < last) {
        eprintln!("replaying up to position {sent} only: the relay itself sends all later events");
        last = sent;
    }
    if arguments.dry_run {
        target = Target::Nowhere;
    }
    let stop = Stop::on_ctrl_c();
    let bar = match target {
        // On a terminal, the lines and a bar would overwrite each other.
        Target::Output(_) => indicatif::ProgressBar::hidden(),
        _ => progress::bar("replayed", (last - first + 1).max(0).unsigned_abs(), &stop),
    };
    let mut pass = Pass::new(store, &arguments, first..=last, bar);
    let ended = pass.run(&mut target, &stop).await;
    let replayed = if arguments.dry_run { "would be replayed" } else { "replayed" };
    let said = format!("{} events {replayed}", grouped(pass.events));
    let continuation = || {
        let command = arguments.resumed(resume, pass.position, last);
        format!("up to position {}; to continue, run: {command}", pass.position)
    };
    match ended {
        Ok(true) => {}
        Ok(false) => {
            eprintln!("stopped: {said}, {}", continuation());
            return Ok(Verdict::Stopped);
        }
        Err(Failure::Message(reason)) if matches!(target, Target::File(_) | Target::Topic(_) | Target::Handler(_)) => {
            return Err(Failure::new(format!("{reason}\n{said}, {}", continuation())));
        }
        Err(failure) => return Err(failure),
    }
    let until = Position(last.max(pass.position));
    match target {
        Target::Output(_) => {}
        _ => output.line(&format!("{said}, from positions {first} to {until}"))?,
    }
    Ok(Verdict::Fine)
}

/// Returns the first and the last position of the replay.
async fn range(arguments: &ReplayArgs, archive: &dyn Archive) -> Result<(i64, i64), StoreError> {
    let first = match (arguments.from, arguments.since) {
        (Some(position), _) => position.max(1),
        (None, Some(Moment(time))) => position_at(archive, time).await?.0 + 1,
        (None, None) => 1,
    };
    let head = archive.status().await?.head.0;
    let last = match (arguments.to, arguments.until) {
        (Some(position), _) => position.min(head),
        (None, Some(Moment(time))) => position_at(archive, time).await?.0,
        (None, None) => head,
    };
    Ok((first, last))
}

/// Opens the target. A dry run opens a topic or a handler too, to check that it exists, but opens no file.
async fn open<'a>(
    arguments: &ReplayArgs,
    store: &Store,
    domain: &Domain,
    output: &'a mut Output,
) -> Result<Target<'a>, Failure> {
    Ok(match (&arguments.output, &arguments.bus, &arguments.handler) {
        (None, Some(settings), _) => Target::Topic(Box::new(TopicTarget::open(settings, arguments, store).await?)),
        (None, None, Some(handler)) => Target::Handler(HandlerTarget::of(handler, domain, store)?),
        _ if arguments.dry_run => Target::Nowhere,
        (Some(path), ..) => Target::file(path, arguments.append)?,
        (None, None, None) => Target::Output(output),
    })
}
