//! The reasons why services do not start.

use std::{fmt, sync::Arc};

use uuid::Uuid;

use crate::{base::name::NameError, bus::BusError, event::Position, store::StoreError};

/// Why services were not started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The import into the store is incomplete. An import writes checkpoints before events, so a service that starts
    /// now would skip the events that are still missing.
    #[error(
        "service {service}: the import into the store is not complete; run the same `import` to its end, or begin \
         with an empty store"
    )]
    HalfImported {
        /// The service that uses the store.
        service: String,
    },
    /// A recovery was not finished. Topics may hold events that are missing from the log.
    #[error(
        "service {service}: the recovery of the store is not complete; run the same `annals recover` again to its end"
    )]
    HalfRecovered {
        /// The service that uses the store.
        service: String,
    },
    /// The bus holds messages that are missing from the log. Either the database was restored, or a new database is
    /// used with topics that another log has filled.
    #[error("{0}")]
    Ahead(Box<Ahead>),
    /// A name is not valid, or two parts have the same name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A saga has two definitions with the same hash.
    #[error("service {service}: {reason}")]
    Definitions {
        /// The service that runs the saga.
        service: String,
        /// The definitions, and the remedy.
        reason: String,
    },
    /// The store failed to answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The bus cannot be joined.
    #[error(transparent)]
    Bus(#[from] BusError),
}

/// A message that a service sent, but whose event is missing from the log of the service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ahead {
    /// The name of the service that sent the message.
    pub service: String,
    /// The topic that holds the message.
    pub topic: Arc<str>,
    /// The partition that holds the message.
    pub partition: u32,
    /// The offset of the message in the partition.
    pub offset: i64,
    /// The name of the log that the message came from.
    pub log: String,
    /// The position of the message's event in that log.
    pub position: Position,
    /// The id of the message.
    pub id: Uuid,
    /// Whether that log is a later state of this log. If not, this store does not know the name of that log.
    pub is_this_log: bool,
}

impl fmt::Display for Ahead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { service, topic, partition, offset, log, position, id, is_this_log } = self;
        write!(
            f,
            "service {service}: topic {topic} is ahead of the log. Message {id}, at offset {offset} of partition {partition}, was sent from position {position} of log {log}, "
        )?;
        f.write_str(match is_this_log {
            true => {
                "which is this log, and the log no longer holds that event: the database was restored to an earlier \
                 moment. "
            }
            false => {
                "which this store does not know: it is a new store, or was restored from before the log had that name. "
            }
        })?;
        write!(
            f,
            "Stop all instances and run `annals recover --store URL --bus URL --service {service}`, which copies \
             the lost events back from the topics. To begin without that history, add `--anew`, or delete the \
             topics of all services"
        )
    }
}
