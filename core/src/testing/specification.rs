//! The specification of one decision: given these events, when a command arrives, then these events follow.

use std::fmt::{Debug, Write};

use crate::{decide::aggregate::Aggregate, event::Event};

/// An aggregate with a history.
#[derive(Clone, Debug)]
#[must_use = "a specification says nothing before `then`, `nothing` or `refused`"]
pub struct Given<A> {
    aggregate: A,
}

/// The outcome of a command.
#[must_use = "a specification says nothing before `then`, `nothing` or `refused`"]
pub struct When<A: Aggregate> {
    aggregate: A,
    outcome: Result<Vec<A::Event>, A::Refusal>,
}

debug_fields!([A: Aggregate] When<A> {});

/// Folds an aggregate from `events`; `given::<Order>([])` starts without events.
///
/// Each event is written to JSON and read back, like a stored event.
///
/// # Panics
/// Panics if an event changes on its way through JSON.
#[track_caller]
pub fn given<A: Aggregate>(events: impl IntoIterator<Item = A::Event>) -> Given<A>
where
    A::Event: Debug + PartialEq,
{
    let mut aggregate = A::default();
    for event in events {
        aggregate.evolve(&stored(event));
    }
    Given { aggregate }
}

impl<A: Aggregate> Given<A> {
    /// Lets the aggregate decide on a command.
    pub fn when(self, command: A::Command) -> When<A> {
        let outcome = self.aggregate.decide(&command);
        When { aggregate: self.aggregate, outcome }
    }

    /// Returns the folded aggregate.
    pub fn state(self) -> A {
        self.aggregate
    }
}

impl<A: Aggregate> When<A>
where
    A::Event: Debug + PartialEq,
{
    /// Expects exactly these events, and returns the aggregate after them.
    ///
    /// # Panics
    /// Panics if other events follow (the message shows a diff), if the command was refused, or if an event changes on
    /// its way through JSON.
    #[track_caller]
    #[allow(clippy::must_use_candidate, reason = "most tests do not need the aggregate after the events")]
    pub fn then(self, expected: impl IntoIterator<Item = A::Event>) -> A {
        let expected: Vec<_> = expected.into_iter().collect();
        let actual = match self.outcome {
            Ok(actual) => actual,
            Err(refusal) => panic!("expected {expected:#?}\nbut it was refused: {refusal} ({refusal:?})"),
        };
        if actual != expected {
            panic!("other events follow (- expected, + actual):\n{}", diff(&expected, &actual));
        }
        let mut aggregate = self.aggregate;
        for event in actual {
            aggregate.evolve(&stored(event));
        }
        aggregate
    }

    /// Expects no events, for example because the command repeats work that is already done.
    ///
    /// # Panics
    /// Panics if events follow, or if the command was refused.
    #[track_caller]
    pub fn nothing(self) {
        self.then([]);
    }

    /// Expects a refusal for this reason.
    ///
    /// # Panics
    /// Panics if the command was accepted, or refused for another reason.
    #[track_caller]
    pub fn refused(self, expected: A::Refusal)
    where
        A::Refusal: PartialEq,
    {
        let actual = self.refusal();
        if actual != expected {
            panic!("refused for another reason (- expected, + actual):\n{}", diff(&expected, &actual));
        }
    }

    /// Expects a refusal for which `fits` returns true. This method is for refusals that cannot be compared, or whose
    /// details do not matter.
    ///
    /// # Panics
    /// Panics if the command was accepted, or refused for a reason that does not fit.
    #[track_caller]
    pub fn refused_as(self, fits: impl FnOnce(&A::Refusal) -> bool) {
        let actual = self.refusal();
        if !fits(&actual) {
            panic!("refused for another reason: {actual} ({actual:?})");
        }
    }

    #[track_caller]
    fn refusal(self) -> A::Refusal {
        match self.outcome {
            Ok(events) => panic!("expected a refusal, but these events follow: {events:#?}"),
            Err(refusal) => refusal,
        }
    }
}

/// Returns `event` as a store would return it.
#[track_caller]
fn stored<E: Event + Debug + PartialEq>(event: E) -> E {
    let back = event.encode().and_then(|data| E::decode(event.type_name(), event.schema_version(), &data));
    match back {
        Ok(Some(back)) if back == event => back,
        Ok(Some(back)) => {
            panic!("an event changes on its way through JSON (- written, + read):\n{}", diff(&event, &back))
        }
        Ok(None) => panic!("an event is skipped when it is read: {event:#?}"),
        Err(error) => panic!("an event does not come back from JSON: {error}\n{event:#?}"),
    }
}

/// Returns the lines of both values as a diff, in the order of the longest common subsequence.
fn diff<E: Debug + ?Sized, A: Debug + ?Sized>(expected: &E, actual: &A) -> String {
    let expected = format!("{expected:#?}");
    let actual = format!("{actual:#?}");
    let old: Vec<_> = expected.lines().collect();
    let new: Vec<_> = actual.lines().collect();
    // common[i][j]: how many lines old[i..] and new[j..] have in common.
    let mut common = vec![vec![0usize; new.len() + 1]; old.len() + 1];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            let skip = common[i + 1][j].max(common[i][j + 1]);
            common[i][j] = if old[i] == new[j] { common[i + 1][j + 1] + 1 } else { skip };
        }
    }
    let mut i = 0;
    let mut j = 0;
    let mut text = String::new();
    let mut line = |mark, line| _ = writeln!(text, "  {mark} {line}");
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            line(' ', old[i]);
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || i < old.len() && common[i + 1][j] >= common[i][j + 1] {
            line('-', old[i]);
            i += 1;
        } else {
            line('+', new[j]);
            j += 1;
        }
    }
    text
}
