//! Calls a handler again for past events, if its service allows that.

use std::sync::Arc;

use annals::{EventStore, Handler, Message, Recorded, Request, Transaction};

use crate::{domain::Domain, failure::Failure, store::Store};

pub(super) struct HandlerTarget {
    name: Arc<str>,
    handler: Arc<dyn Handler>,
    store: Arc<dyn EventStore>,
    /// The position of an event whose commit has not been confirmed.
    pub under_way: Option<i64>,
}

impl HandlerTarget {
    pub fn of(name: &str, domain: &Domain, store: &Store) -> Result<Self, Failure> {
        let handler = domain.handler(name)?;
        Ok(Self { name: name.into(), handler, store: store.port(), under_way: None })
    }

    /// Commits what the handler stages, one commit per event. If the handler sends commands, they have the same ids as
    /// when the handler first ran.
    pub async fn take(&mut self, event: &Recorded) -> Result<(), Failure> {
        self.under_way = Some(event.position.0);
        let message = Message::of(event, &self.name);
        let name = self.name.clone();
        let failed = |reason: &dyn std::fmt::Display| {
            Failure::new(format!("handler {name} failed at position {}: {reason}", event.position))
        };
        let request = Request::new(message.id, message.effects());
        let handler = &self.handler;
        let message = &message;
        let handled = Transaction::new(self.store.clone(), request).run(|mut work| async move {
            handler.prepare(&[message], &mut work).await?;
            handler.handle(message, &mut work).await.map(|()| (work, ()))
        });
        handled.await.map_err(|error| failed(&error))?;
        self.under_way = None;
        Ok(())
    }
}
