//! Categories: whose they are, and which of those that are named anywhere do not exist.

use std::{
    any::type_name,
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use tokio::time::{Instant, sleep};

use crate::{
    aggregate::Aggregate,
    event::{Event, EventType, Position, StreamId, StreamIdError},
    health::{Health, State},
    operator,
    store::{EventStore, LogQuery, StoreError},
};

/// How long a category that a service publishes or follows may be unknown before health names it.
const UNKNOWN_MAX: Duration = Duration::from_secs(10);
/// How often the log is searched for it, and how many events one look takes.
const LOOK: Duration = Duration::from_millis(500);
const PAGE: usize = 1_000;
/// Between two pages, so that the search of a long log is in the way of nobody.
const PAUSE: Duration = Duration::from_millis(10);
/// Beginnings of categories that the framework keeps for sagas and for the steps of participants.
const RESERVED: [&str; 2] = ["saga.", "step."];

/// The aggregates that this process has repositories of.
static KNOWN: Mutex<Vec<Known>> = Mutex::new(Vec::new());

struct Known {
    store: Weak<dyn EventStore>,
    category: String,
    aggregate: &'static str,
    events: &'static [EventType],
}

/// Whether this can be a category.
pub(crate) fn check(category: &str) -> Result<(), StreamIdError> {
    StreamId::new(category, "1").map(drop)
}

/// Whether this can be the category of a user's own aggregate.
pub(crate) fn check_own(category: &str) -> Result<(), String> {
    check(category).map_err(|error| error.to_string())?;
    if category == operator::CATEGORY || RESERVED.iter().any(|reserved| category.starts_with(reserved)) {
        return Err(format!(
            "category {category:?} is the framework's own: `operator`, `saga.…` and `step.…` are reserved"
        ));
    }
    Ok(())
}

/// Takes note that aggregates of this kind are in this category.
///
/// # Errors
/// If another kind is already, whose events are all others: each would meet events that it cannot read. Two builds of one
/// aggregate have events in common.
pub(crate) fn register<A: Aggregate>(store: &Arc<dyn EventStore>, category: &str) -> Result<(), String> {
    let (aggregate, events) = (type_name::<A>(), A::Event::TYPES);
    let mut all = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|known| known.store.strong_count() > 0);
    let here = Arc::as_ptr(store).cast::<()>();
    for known in all.iter().filter(|known| known.store.as_ptr().cast::<()>() == here && known.category == category) {
        if known.aggregate == aggregate {
            return Ok(());
        }
        let shares = known.events.iter().any(|known| events.iter().any(|event| event.name == known.name));
        if !shares && !events.is_empty() && !known.events.is_empty() {
            return Err(format!(
                "aggregates {} and {aggregate} are both in category {category:?} of one store, and have no event in common: give one \
                 of them another category",
                known.aggregate
            ));
        }
    }
    all.push(Known { store: Arc::downgrade(store), category: category.to_owned(), aggregate, events });
    Ok(())
}

fn is_registered(category: &str) -> bool {
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|known| known.category == category)
}

/// Names the categories that a service publishes or follows, and that neither an aggregate of this process nor an event of the
/// log has, until they have one.
pub(crate) async fn watch(
    service: String,
    store: Arc<dyn EventStore>,
    mut unknown: BTreeSet<Arc<str>>,
    health: Health,
) {
    let part = format!("{service}.categories");
    let (started, mut after, mut told) = (Instant::now(), Position::START, false);
    loop {
        unknown.retain(|category| !is_registered(category));
        // A store that is away is named by others.
        while let Ok(page) = look(&*store, &mut unknown, after).await {
            let read = std::mem::replace(&mut after, page) < page;
            if !read || unknown.is_empty() {
                break;
            }
            sleep(PAUSE).await;
        }
        if unknown.is_empty() {
            if told {
                health.remove(&part);
            }
            return;
        }
        if started.elapsed() >= UNKNOWN_MAX {
            let names: Vec<_> = unknown.iter().map(|category| format!("{category:?}")).collect();
            let reason = format!(
                "service {service} publishes or follows category {}, which no aggregate of this process and no event has: is it \
                 spelt as in Aggregate::CATEGORY?",
                names.join(", ")
            );
            if !std::mem::replace(&mut told, true) {
                tracing::warn!(%service, %reason, "a category is unknown");
            }
            health.set(&part, State::NeedsAttention(reason));
        }
        sleep(LOOK).await;
    }
}

/// Looks through a page of the log for events of these categories; where it ended.
async fn look(
    store: &dyn EventStore,
    unknown: &mut BTreeSet<Arc<str>>,
    after: Position,
) -> Result<Position, StoreError> {
    if unknown.is_empty() {
        return Ok(after);
    }
    let page = store.read_log(&LogQuery::categories(unknown.iter().cloned()), after, PAGE).await?;
    for event in &page.events {
        unknown.remove(event.stream.category());
    }
    Ok(page.next)
}
