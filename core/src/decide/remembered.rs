//! The most recent commands of a stream. They are remembered so that a repeated command is recognised.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    commit::COMMIT_ROWS_MAX,
    event::{Version, derived_id},
};

/// The number of recent commands that are remembered per stream, so that a repeated command is recognised. The number
/// of events per command does not matter, unless the `causation_id` of a [`Request`](crate::Request) differs from its
/// command id: after a restart, such commands are recognised among the last 10,000 events only. A command that is
/// repeated after more than this many other commands counts as new. Each saga has its own stream in each service, and
/// such a stream receives far fewer commands than this.
pub const REMEMBERED_COMMANDS: usize = 1_024;
/// The maximum number of uncertain events that are remembered. If the store does not show which command an event
/// belongs to, each event may be the first event of a command, and is remembered separately. The maximum equals the
/// number of events in the largest commit.
const UNCERTAIN_EVENTS_MAX: usize = COMMIT_ROWS_MAX;

/// How many command ids are tried per event of a run with several commands. The number is limited so that a run whose
/// events have ids of their own takes little time. It is greater than one because other streams may have received some
/// of the commands.
const TRIES_PER_EVENT: u64 = 4;

/// Returns the id of a command of a unit of work. One message may send two equal commands to one stream. Each command
/// gets its own id, so that the second command does not count as a repetition of the first.
pub(crate) fn command_id(cause: Uuid, call: u64) -> Uuid {
    if call == 0 { cause } else { derived_id(cause, u64::MAX - call) }
}

/// The first event of each of the most recent commands.
///
/// For a command that this process has staged, only the first event is remembered. An event read from the store names
/// only its cause, so the boundaries between commands are inferred. A new cause starts a new command. A sequence of
/// events with the same cause is called a run. A run is a single command if the id of its last event can be derived
/// from the cause and the length of the run. Otherwise, for example after a message that caused several commands, every
/// event of the run is remembered.
#[derive(Clone, Debug, Default)]
pub(crate) struct Remembered {
    /// The remembered events, in the order of the stream.
    events: VecDeque<First>,
    /// The number of `events` that are possibly not the first event of a command.
    uncertain: usize,
    /// The current run of events with one cause.
    run: Option<CauseRun>,
}

/// An event that is, or may be, the first event of a command.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct First {
    id: Uuid,
    version: Version,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    uncertain: bool,
}

#[derive(Clone, Debug)]
struct CauseRun {
    cause: Uuid,
    events: u64,
    last: Uuid,
}

impl Remembered {
    /// Records that this event is the first event of a command.
    pub fn begin(&mut self, id: Uuid, version: Version) {
        self.end_of_run();
        self.push(First { id, version, uncertain: false });
    }

    /// Records an event that was read from the store. Call [`end_of_run`](Self::end_of_run) after the last event.
    pub fn read(&mut self, id: Uuid, version: Version, cause: Uuid) {
        match &mut self.run {
            Some(run) if run.cause == cause => {
                run.events += 1;
                run.last = id;
                self.push(First { id, version, uncertain: true });
            }
            _ => {
                self.begin(id, version);
                self.run = Some(CauseRun { cause, events: 1, last: id });
            }
        }
    }

    /// Ends the current run, because no further event of the run follows.
    pub fn end_of_run(&mut self) {
        let Some(run) = self.run.take() else { return };
        // This costs one hash for a whole run, and none for the usual command with a single event.
        if run.events > 1 && run.last == derived_id(run.cause, run.events - 1) {
            while self.events.pop_back_if(|event| event.uncertain).is_some() {
                self.uncertain -= 1;
            }
        } else if run.events > 1 {
            self.split(&run);
        }
        self.trim(UNCERTAIN_EVENTS_MAX);
    }

    /// Replaces the events of a run by the first events of its commands, as far as these commands can be found.
    fn split(&mut self, run: &CauseRun) {
        let Some(start) = usize::try_from(run.events).ok().and_then(|events| self.events.len().checked_sub(events))
        else {
            return;
        };
        let mut events = self.events.split_off(start);
        self.uncertain -= events.iter().filter(|event| event.uncertain).count();
        let mut calls = 0..TRIES_PER_EVENT * run.events;
        let mut next = None;
        while let Some(event) = events.pop_front() {
            if let Some((command, index)) = &mut next
                && event.id == derived_id(*command, *index)
            {
                *index += 1;
                continue;
            }
            let mut commands = calls.by_ref().map(|call| command_id(run.cause, call));
            match commands.find(|command| event.id == derived_id(*command, 0)) {
                Some(command) => {
                    next = Some((command, 1));
                    self.push(First { uncertain: false, ..event });
                }
                None => {
                    self.push(event);
                    return events.into_iter().for_each(|event| self.push(event));
                }
            }
        }
    }

    /// Returns the version of a command's first event, if the command is remembered.
    pub fn version_of(&self, command_id: Uuid) -> Option<Version> {
        if self.events.is_empty() {
            return None;
        }
        let id = derived_id(command_id, 0);
        self.events.iter().find(|event| event.id == id).map(|event| event.version)
    }

    /// Returns the first events of all remembered commands after a version, newest first.
    pub fn since(&self, version: Version) -> impl Iterator<Item = (Version, Uuid)> + '_ {
        self.events.iter().rev().map(|event| (event.version, event.id)).take_while(move |(of, _)| *of > version)
    }

    /// Returns the remembered events for a snapshot.
    pub fn to_stored(&self) -> Vec<First> {
        self.events.iter().copied().collect()
    }

    /// Restores the remembered events from a snapshot.
    pub fn from_stored(events: Vec<First>) -> Self {
        let uncertain = events.iter().filter(|event| event.uncertain).count();
        Self { events: events.into(), uncertain, run: None }
    }

    /// Restores the remembered events from a snapshot of an older build. Such a snapshot stores the ids of the stream's
    /// most recent events. The last of these ids belongs to the event at `version`.
    pub fn from_ids(ids: &[Uuid], version: Version) -> Self {
        let versions = (version.0 + 1).saturating_sub_unsigned(ids.len() as u64)..;
        let first = |(id, version): (&Uuid, i64)| First { id: *id, version: Version(version), uncertain: true };
        Self::from_stored(ids.iter().zip(versions).map(first).collect())
    }

    fn push(&mut self, event: First) {
        self.uncertain += usize::from(event.uncertain);
        self.events.push_back(event);
        // The limit is doubled here, so that a run that turns out to be a single command does not displace the commands
        // before the run.
        self.trim(2 * UNCERTAIN_EVENTS_MAX);
    }

    fn trim(&mut self, uncertain_max: usize) {
        while self.uncertain > uncertain_max || self.events.len() - self.uncertain > REMEMBERED_COMMANDS {
            let Some(forgotten) = self.events.pop_front() else { return };
            self.uncertain -= usize::from(forgotten.uncertain);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Records the events of a command after the events that are already remembered.
    fn read(remembered: &mut Remembered, next: &mut i64, command_id: Uuid, cause: Uuid, events: u64) -> Version {
        let first = Version(*next);
        for index in 0..events {
            remembered.read(derived_id(command_id, index), Version(*next), cause);
            *next += 1;
        }
        first
    }

    #[test]
    fn commands_are_remembered_for_any_number_of_events() {
        let mut remembered = Remembered::default();
        let mut next = 1;
        let commands: Vec<_> = (0..2_000).map(|number| (Uuid::new_v4(), 1 + number % 30)).collect();
        let firsts: Vec<_> =
            commands.iter().map(|(id, events)| read(&mut remembered, &mut next, *id, *id, *events)).collect();
        remembered.end_of_run();
        assert_eq!(remembered.events.len(), REMEMBERED_COMMANDS);
        for ((id, _), first) in commands.iter().zip(firsts).rev().take(REMEMBERED_COMMANDS) {
            assert_eq!(remembered.version_of(*id), Some(first));
        }
    }

    #[test]
    fn largest_commit_is_remembered_with_and_without_boundaries() {
        for unknown_cause in [false, true] {
            let mut remembered = Remembered::default();
            let mut next = 1;
            let before = Uuid::new_v4();
            read(&mut remembered, &mut next, before, before, 1);
            let cause = Uuid::new_v4();
            let large = if unknown_cause { Uuid::new_v4() } else { cause };
            let first = read(&mut remembered, &mut next, large, cause, COMMIT_ROWS_MAX as u64);
            remembered.end_of_run();
            assert_eq!(remembered.version_of(large), Some(first));
            assert_eq!(remembered.version_of(before), Some(Version(1)));
            let held = if unknown_cause { COMMIT_ROWS_MAX + 1 } else { 2 };
            assert_eq!(remembered.events.len(), held);
        }
    }

    #[test]
    fn several_commands_with_one_cause_are_all_remembered() {
        let mut remembered = Remembered::default();
        let mut next = 1;
        let cause = Uuid::new_v4();
        let commands = [cause, derived_id(cause, u64::MAX - 1), derived_id(cause, u64::MAX - 2)];
        let firsts = commands.map(|id| read(&mut remembered, &mut next, id, cause, 3));
        remembered.end_of_run();
        assert_eq!(commands.map(|id| remembered.version_of(id)), firsts.map(Some));
    }

    #[test]
    fn large_commands_with_one_cause_are_remembered_by_their_first_events() {
        let mut remembered = Remembered::default();
        let mut next = 1;
        let mut firsts = Vec::new();
        for _ in 0..REMEMBERED_COMMANDS / 2 {
            let cause = Uuid::new_v4();
            // Another stream has received the commands in between.
            for call in [0, 3] {
                let id = command_id(cause, call);
                firsts.push((id, read(&mut remembered, &mut next, id, cause, 30)));
            }
        }
        remembered.end_of_run();
        assert_eq!(remembered.events.len(), REMEMBERED_COMMANDS);
        assert_eq!(remembered.uncertain, 0);
        for (id, first) in firsts {
            assert_eq!(remembered.version_of(id), Some(first));
        }
    }

    #[test]
    fn events_without_a_cause_take_bounded_memory() {
        let mut remembered = Remembered::default();
        for number in 1..100_000 {
            remembered.read(Uuid::new_v4(), Version(number), Uuid::nil());
            assert!(remembered.events.len() <= 2 * UNCERTAIN_EVENTS_MAX + REMEMBERED_COMMANDS);
        }
        remembered.end_of_run();
        assert_eq!(remembered.events.len(), UNCERTAIN_EVENTS_MAX);
    }

    #[test]
    fn snapshots_keep_remembered_commands_and_older_snapshots_load() {
        let ids: Vec<_> = (0..5).map(|_| Uuid::new_v4()).collect();
        let firsts: Vec<_> = ids.iter().map(|id| derived_id(*id, 0)).collect();
        let older = Remembered::from_ids(&firsts, Version(7));
        let known: Vec<_> = ids.iter().map(|id| older.version_of(*id)).collect();
        assert_eq!(known, (3..=7).map(|version| Some(Version(version))).collect::<Vec<_>>());
        let text = serde_json::to_string(&older.to_stored()).unwrap();
        let again = Remembered::from_stored(serde_json::from_str(&text).unwrap());
        assert_eq!((again.to_stored(), again.uncertain), (older.to_stored(), 5));
    }
}
