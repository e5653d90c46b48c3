//! `check-history` reports a build that would read the recorded events differently, or whose sagas would act
//! differently.
#![allow(clippy::unwrap_used)]

mod travel;

use std::process::ExitCode;

use annals::{Event, saga::StepRequest};
use annals_cli::Ops;

use travel::{Place, Step, TripEvent, journey, planned};

/// The event enum of another build, in which the price has become a string.
#[derive(Event, Clone, Debug)]
#[event(prefix = "trip")]
enum NewTripEvent {
    #[allow(dead_code)]
    Ordered { trip_id: String, price: String },
}

#[tokio::test(flavor = "multi_thread")]
async fn check_history_reports_changed_events_and_sagas() {
    let place = Place::with_trips().await;
    let file = place.file("trips.ndjson").to_str().unwrap().to_owned();
    place.annals(&["export", &file]).fine();
    let words = || ["check-history", "--against", &file].map(std::ffi::OsString::from);
    let ops = || Ops::named("travel ops");

    let same = ops().events::<TripEvent>().saga(journey());
    assert_eq!(same.run(words()).await, ExitCode::SUCCESS);
    let other_event = ops().events::<NewTripEvent>().saga(journey());
    assert_eq!(other_event.run(words()).await, ExitCode::from(1));
    let other_plan =
        planned("charge twice", |j| StepRequest::to("agency", &Step::Charge { trip_id: j.trip_id.clone() }));
    assert_eq!(ops().events::<TripEvent>().saga(other_plan).run(words()).await, ExitCode::from(1));
    // The plan has the same shape and therefore the same hash.
    let other_command =
        planned("charge card", |j| StepRequest::to("agency", &Step::Charge { trip_id: j.trip_id.to_uppercase() }));
    assert_eq!(ops().events::<TripEvent>().saga(other_command).run(words()).await, ExitCode::from(1));

    // The generic command does not know any service's events.
    let told = place.annals(&["check-history", "--against", &file]);
    assert_eq!(told.code, 1);
    assert!(told.out.contains("event type trip.ordered is unknown to this build"), "{}", told.out);
    let missing = place.annals(&["check-history", "--against", "nowhere"]).refused();
    assert!(missing.contains("nowhere cannot be read"), "{missing}");
}
