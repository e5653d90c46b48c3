//! Step 5 of 8. A saga books a room and charges a card, in two services, and releases the room if the card is declined.
//!
//!     cargo run -p annals-examples --example saga

use std::{convert::Infallible, error::Error, sync::Arc, time::Duration};

use annals::{
    Aggregate, Answer, DocumentKey, Event, EventStore, HandlerError, LocalBus, LogQuery, MemoryStore, Message,
    Participant, Repository, Runtime, Saga, SagaState, Service, StepError, Work,
    saga::{Runner, StepRequest},
};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The event that starts a saga, and the data of the saga.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "trip")]
enum TripEvent {
    Requested(Trip),
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Trip {
    id: String,
    pence: u64,
}

impl SagaState for Trip {}

impl Aggregate for Trip {
    const CATEGORY: &'static str = "trip";
    type Command = Trip;
    type Event = TripEvent;
    type Refusal = Infallible;

    fn decide(&self, trip: &Trip) -> Result<Vec<TripEvent>, Infallible> {
        Ok(vec![TripEvent::Requested(trip.clone())])
    }

    fn evolve(&mut self, _: &TripEvent) {}
}

// ANCHOR: plan
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "booking")]
enum Booking {
    HoldRoom { trip: String },
    ReleaseRoom { trip: String },
    Charge { pence: u64 },
}

fn plan() -> Saga<Trip> {
    Saga::named("trip")
        .compensatable("hold room", |trip: &Trip| {
            StepRequest::to("hotel", &Booking::HoldRoom { trip: trip.id.clone() })
        })
        .undo(|trip| StepRequest::to("hotel", &Booking::ReleaseRoom { trip: trip.id.clone() }))
        .pivot("charge card", |trip| StepRequest::to("bank", &Booking::Charge { pence: trip.pence }))
        .build()
}

fn starts(message: &Message) -> Result<Option<(String, Trip)>, HandlerError> {
    Ok(message.decode()?.map(|TripEvent::Requested(trip)| (trip.id.clone(), trip)))
}
// ANCHOR_END: plan

// ANCHOR: participant
/// Carries out the steps of the hotel and of the bank.
struct Clerk;

#[async_trait]
impl Participant for Clerk {
    type Command = Booking;

    async fn perform(&self, step: Booking, work: &mut Work) -> Result<Answer, StepError> {
        match step {
            Booking::HoldRoom { trip } => work.put(&DocumentKey::new("rooms", trip), &"held")?,
            Booking::ReleaseRoom { trip } => work.remove(&DocumentKey::new("rooms", trip)),
            Booking::Charge { pence } if pence > 50_000 => {
                return Err(StepError::Refused("the card is declined".to_owned()));
            }
            Booking::Charge { .. } => {}
        }
        Ok(Answer::DONE)
    }
}
// ANCHOR_END: participant

// ANCHOR: run
#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let runner = Runner::new(plan(), LogQuery::categories([Trip::CATEGORY]), starts);
    let sagas = runner.on(store.clone());
    let desk = Service::new("desk", store.clone()).saga(runner);
    let hotel = Service::new("hotel", store.clone()).participant(Clerk);
    let bank = Service::new("bank", store.clone()).participant(Clerk);
    let mut runtime = Runtime::new();
    runtime.start(vec![desk, hotel, bank], Arc::new(LocalBus::default())).await?;

    let trips = Repository::<Trip>::new(store.clone());
    for (id, pence) in [("to-york", 9_000), ("to-tokyo", 120_000)] {
        trips.execute(id, Trip { id: id.to_owned(), pence }, Uuid::new_v4()).await?;
        let ended = sagas.wait_for_end(id, Duration::from_secs(10)).await?;
        let held = store.documents(&[DocumentKey::new("rooms", id)]).await?;
        let room = if held[0].is_some() { "a room" } else { "no room" };
        let why = ended.failure.map(|failure| format!(", because of {failure}")).unwrap_or_default();
        println!("{id} is {:?} with {room}{why}", ended.status);
    }
    Ok(runtime.drain(Duration::from_secs(10)).await?)
}
// ANCHOR_END: run
