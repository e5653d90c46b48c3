//! The registry of categories. This module records which aggregate uses each category. It also reports categories that
//! a service publishes or follows but that do not exist.

use std::{
    any::type_name,
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use tokio::time::{Instant, sleep};

use crate::{
    decide::aggregate::Aggregate,
    event::{Event, EventType, Position, StreamId, StreamIdError},
    health::{Health, State},
    store::{EventStore, LogQuery, StoreError, pages::PAGE},
};

/// How long a category that a service publishes or follows may be missing before the health report names the category.
const UNKNOWN_MAX: Duration = Duration::from_secs(10);
/// The time between two searches of the log for missing categories.
const LOOK: Duration = Duration::from_millis(500);
/// The pause between two pages, so that the search of a long log does not slow down other readers.
const PAUSE: Duration = Duration::from_millis(10);
/// The category of the streams that record operator actions. Each subscription has its own stream.
pub const OPERATOR: &str = "operator";
/// The prefixes of categories that the framework reserves for sagas and for the steps of participants.
const RESERVED: [&str; 2] = ["saga.", "step."];

/// The aggregates for which this process has repositories.
static KNOWN: Mutex<Vec<KnownAggregate>> = Mutex::new(Vec::new());

struct KnownAggregate {
    store: Weak<dyn EventStore>,
    category: String,
    aggregate: &'static str,
    events: &'static [EventType],
}

/// Checks that the string is a valid category.
pub(crate) fn check(category: &str) -> Result<(), StreamIdError> {
    StreamId::new(category, "1").map(drop)
}

/// Checks that the string is a valid category for a user's own aggregate.
pub(crate) fn check_own(category: &str) -> Result<(), String> {
    check(category).map_err(|error| error.to_string())?;
    if category == OPERATOR || RESERVED.iter().any(|reserved| category.starts_with(reserved)) {
        return Err(format!(
            "category {category:?} is the framework's own: `operator`, `saga.…` and `step.…` are reserved"
        ));
    }
    Ok(())
}

/// Registers that aggregates of this type use this category.
///
/// # Errors
/// Fails if another type of aggregate already uses the category, and the two types have no event type in common. Each
/// of the two types would then read events that it cannot decode. Two builds of the same aggregate, however, have event
/// types in common.
pub(crate) fn register<A: Aggregate>(store: &Arc<dyn EventStore>, category: &str) -> Result<(), String> {
    let aggregate = type_name::<A>();
    let events = A::Event::TYPES;
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
    all.push(KnownAggregate { store: Arc::downgrade(store), category: category.to_owned(), aggregate, events });
    Ok(())
}

fn is_registered(category: &str) -> bool {
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|known| known.category == category)
}

/// Reports each category that a service publishes or follows, if no aggregate of this process uses the category and the
/// log has no event in the category. A category is reported until such an aggregate or event appears.
pub(crate) async fn watch(
    service: String,
    store: Arc<dyn EventStore>,
    mut unknown: BTreeSet<Arc<str>>,
    health: Health,
) {
    let part = format!("{service}.categories");
    let started = Instant::now();
    let mut after = Position::START;
    let mut reported = false;
    loop {
        unknown.retain(|category| !is_registered(category));
        // If the store is unavailable, other parts of the service report the problem.
        while let Ok(page) = look(&*store, &mut unknown, after).await {
            let read = std::mem::replace(&mut after, page) < page;
            if !read || unknown.is_empty() {
                break;
            }
            sleep(PAUSE).await;
        }
        if unknown.is_empty() {
            if reported {
                health.remove(&part);
            }
            return;
        }
        if started.elapsed() >= UNKNOWN_MAX {
            let names: Vec<_> = unknown.iter().map(|category| format!("{category:?}")).collect();
            let reason = format!(
                "service {service} publishes or follows category {}, but no aggregate of this process and no event \
                 in the log has that category: compare the spelling with Aggregate::CATEGORY",
                names.join(", ")
            );
            if !std::mem::replace(&mut reported, true) {
                tracing::warn!(%service, %reason, "a category is unknown");
            }
            health.set(&part, State::NeedsAttention(reason));
        }
        sleep(LOOK).await;
    }
}

/// Searches one page of the log for events of these categories, and returns the position at the end of the page.
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
