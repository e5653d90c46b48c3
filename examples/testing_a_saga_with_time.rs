//! Step 8 of 8. Tests of a saga: the model checker tries every fault, and a clock that is moved by hand makes a deadline
//! of three days pass in a moment.
//!
//!     cargo test -p annals-examples --test testing_a_saga_with_time

use std::{convert::Infallible, error::Error, sync::Arc, time::Duration};

use annals::{
    Aggregate, Clock, Event, EventStore, HandlerError, LocalBus, LogQuery, MemoryStore, Message, Repository, Runtime,
    Saga, SagaState, Service, StepError,
    saga::{Runner, Status, StepRequest},
    testing::check,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

const DAY: Duration = Duration::from_secs(24 * 3_600);

/// A guest requests a stay. The hotel has three days to answer, and is asked once a day.
#[derive(Event, Clone, Debug)]
#[event(prefix = "stay")]
enum StayEvent {
    Requested {},
}

#[derive(Clone, Default, Serialize, Deserialize)]
struct Stay;

impl SagaState for Stay {}

impl Aggregate for Stay {
    const CATEGORY: &'static str = "stay";
    type Command = ();
    type Event = StayEvent;
    type Refusal = Infallible;

    fn decide(&self, _: &()) -> Result<Vec<StayEvent>, Infallible> {
        Ok(vec![StayEvent::Requested {}])
    }

    fn evolve(&mut self, _: &StayEvent) {}
}

#[derive(Event, Clone, Debug)]
#[event(prefix = "hotel")]
enum HotelStep {
    Hold {},
    Release {},
    Confirm {},
}

fn plan() -> Saga<Stay> {
    Saga::named("stay")
        .compensatable("hold room", |_: &Stay| StepRequest::to("hotel", &HotelStep::Hold {}))
        .undo(|_| StepRequest::to("hotel", &HotelStep::Release {}))
        .timeout(DAY)
        .pivot("confirm", |_| StepRequest::to("hotel", &HotelStep::Confirm {}))
        .deadline(3 * DAY)
        .build()
}

fn starts(message: &Message) -> Result<Option<(String, Stay)>, HandlerError> {
    Ok(Some((message.subject.replace("stay-", ""), Stay)))
}

// ANCHOR: check
#[test]
fn no_fault_leaves_a_room_held_for_a_guest_who_does_not_come() {
    #[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
    struct Hotel {
        held: bool,
        confirmed: bool,
    }

    let report = check(plan(), Stay)
        .world(Hotel::default())
        .service("hotel", |hotel, step: HotelStep| {
            match step {
                HotelStep::Hold {} => hotel.held = true,
                HotelStep::Release {} => hotel.held = false,
                HotelStep::Confirm {} if !hotel.held => return Err(StepError::Refused("no room is held".to_owned())),
                HotelStep::Confirm {} => hotel.confirmed = true,
            }
            Ok(().into())
        })
        .at_end("a room is held for each confirmed stay, and for no other", |hotel, _| hotel.held == hotel.confirmed)
        .everything()
        .ends_clean();
    assert!(report.states > 100, "{report:?}");
}
// ANCHOR_END: check

// ANCHOR: time
#[tokio::test]
async fn stay_that_no_hotel_answers_is_given_up_after_three_days() -> Result<(), Box<dyn Error>> {
    let clock = Clock::by_hand("2026-02-28T12:00:00Z".parse()?);
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::with_clock(clock.clone()));
    let runner = Runner::new(plan(), LogQuery::categories([Stay::CATEGORY]), starts);
    let mut runtime = Runtime::new();
    let sagas = runner.on(store.clone());
    let desk = Service::new("desk", store.clone()).saga(runner);
    runtime.start(vec![desk], Arc::new(LocalBus::default())).await?;

    let becomes = async |status: Status| {
        while sagas.saga("7").await?.and_then(|saga| saga.progress).is_none_or(|found| found.status != status) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok::<(), Box<dyn Error>>(())
    };
    Repository::<Stay>::new(store).execute("7", (), Uuid::new_v4()).await?;
    becomes(Status::Running).await?;
    clock.advance(3 * DAY);
    becomes(Status::Compensating).await?;
    Ok(runtime.drain(Duration::from_secs(10)).await?)
}
// ANCHOR_END: time
