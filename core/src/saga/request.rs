//! A request of an operator to a stuck saga.
//!
//! The request is an event in the stream of the saga. The stored form of the request uses the time `progress.due`. This
//! time belongs to the document of the saga and not to a timer: the document becomes due when the request is recorded,
//! so that every build finds the request. This file is the only one that writes or reads this form.

use super::progress::{OperatorAction, Progress, SagaEvent, Status};

/// A request that waits until the service of the saga carries it out or declines it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SagaRequest {
    /// The requested action.
    pub verb: OperatorAction,
    /// The operator.
    pub by: String,
    /// The operator's reason.
    pub reason: String,
}

impl SagaRequest {
    /// Returns the event that records the request. `progress` is the progress of the stuck saga.
    pub fn recorded(self, progress: Progress, now: i64) -> SagaEvent {
        let Self { verb, by, reason } = self;
        SagaEvent::Requested { verb, by, reason, progress: marked(progress, now) }
    }

    /// Returns the request that waits after `event`; `before` is the request that waited before `event`, if any.
    pub fn after(event: &SagaEvent, before: Option<Self>) -> Option<Self> {
        match event {
            SagaEvent::Requested { verb, by, reason, .. } => {
                Some(Self { verb: *verb, by: by.clone(), reason: reason.clone() })
            }
            SagaEvent::Operated { .. } | SagaEvent::Declined { .. } => None,
            SagaEvent::Started { .. }
            | SagaEvent::Replied { .. }
            | SagaEvent::Timed { .. }
            | SagaEvent::Migrated { .. } => before,
        }
    }

    /// Returns whether events of this type begin or end the wait of a request.
    pub fn concerns(type_name: &str) -> bool {
        ["saga.requested", "saga.operated", "saga.declined"].contains(&type_name)
    }

    /// Returns whether a due document of a saga with this status stands for a request. A stuck saga has no timer.
    pub fn makes_due(status: Status) -> bool {
        status == Status::Stuck
    }
}

/// Returns the progress to record in an event after which a request waits.
pub(super) fn marked(progress: Progress, now: i64) -> Progress {
    Progress { due: Some(now), ..progress }
}

/// Returns the progress of the saga itself, from the progress that such an event records. While a request waits, the
/// saga has no timer.
pub(super) fn unmarked(progress: Progress) -> Progress {
    Progress { due: None, ..progress }
}
