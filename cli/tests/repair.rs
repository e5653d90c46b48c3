//! An operator repairs what is stuck. The log records every action with its operator and reason.
#![allow(clippy::unwrap_used)]

mod travel;

use std::{sync::Arc, time::Duration};

use annals::{EventStore, Group, LocalBus, Repository, Runtime, Service, saga::Status};
use uuid::Uuid;

use travel::{Brochure, Place, Trip, TripEvent, agency, sagas, until};

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_listed_shown_and_redriven() {
    let place = Place::with_trips().await;
    let list = place.annals(&["dead-letters", "--json"]);
    assert_eq!(list.code, 1, "parked messages are a fault");
    let letter: serde_json::Value = serde_json::from_str(list.out.trim()).unwrap();
    assert_eq!((&letter["subscription"], &letter["key"]), (&"brochure".into(), &"trip-odd-1".into()));
    assert_eq!((&letter["behind"], &letter["retries_at"]), (&0.into(), &serde_json::Value::Null));
    let table = place.annals(&["dead-letters", "list", "brochure"]);
    assert!(table.out.lines().nth(1).unwrap().contains("when redriven"), "{}", table.out);
    let shown = place.annals(&["dead-letters", "show", "brochure", "trip-odd-1"]).fine();
    assert!(
        shown.contains("reason       no such place on the map") && shown.contains("\"type_name\": \"trip.ordered\"")
    );

    let drop = ["dead-letters", "drop", "brochure", "trip-odd-1", "--reason", "a test"];
    let asked = place.annals(&drop).refused();
    assert!(asked.contains("Confirmation needs a terminal: repeat the command with --yes"), "{asked}");
    let unexplained = place.annals(&drop[..4]).refused();
    assert!(unexplained.contains("--reason"), "{unexplained}");
    for words in
        [&["dead-letters", "show", "brochure", "x"][..], &["dead-letters", "redrive", "x", "--all", "--reason", "r"]]
    {
        assert!(place.annals(words).refused().contains("has no parked message"), "{words:?}");
    }

    // The handler still fails when the message is redriven, so the message is parked again.
    let store: Arc<dyn EventStore> = Arc::new(place.open().await);
    let running = agency(&store, false).await;
    let redrive = ["dead-letters", "redrive", "brochure", "trip-odd-1", "--by", "ann", "--reason", "try"];
    assert_eq!(place.annals(&redrive).fine(), "trip-odd-1: 1 message will be handled again\n");
    let attempts = async || {
        let letters = annals::DeadLetters::new(store.clone()).list("brochure").await.unwrap();
        letters.first().map(|letter| letter.parked.attempts)
    };
    until("it is tried again", async || attempts().await == Some(2)).await;
    running.drain(Duration::from_secs(30)).await.unwrap();
    // The message is redriven while the handler works.
    let running = agency(&store, true).await;
    assert_eq!(place.annals(&["dead-letters", "redrive", "brochure", "--all", "--reason", "mended"]).code, 0);
    until("it is handled", async || attempts().await.is_none()).await;
    running.drain(Duration::from_secs(30)).await.unwrap();
    assert_eq!(place.annals(&["dead-letters"]).fine().lines().count(), 1);

    let acts = place.annals(&["read", "operator-brochure", "--json"]).json();
    let told: Vec<_> = acts.iter().map(|act| [&act["type"], &act["data"]["by"], &act["data"]["reason"]]).collect();
    assert_eq!(told, [["operator.redriven", "ann", "try"], ["operator.redriven", "tester", "mended"]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_dead_letter_stays_in_the_log() {
    let place = Place::with_trips().await;
    let drop = ["dead-letters", "drop", "brochure", "trip-odd-1", "--reason", "a test order", "--yes"];
    assert!(place.annals(&drop).fine().starts_with("trip-odd-1: dropped"));
    assert!(place.annals(&drop).refused().contains("brochure has no parked message with the key or id trip-odd-1"));
    let act = &place.annals(&["read", "operator-brochure", "--json"]).json()[0];
    assert_eq!(act["type"], "operator.dropped");
    assert_eq!(act["data"]["parked"]["message"]["type_name"], "trip.ordered");
}

#[tokio::test(flavor = "multi_thread")]
async fn running_service_carries_out_actions_on_a_stuck_saga() {
    let place = Place::with_trips().await;
    let refused = place.annals(&["saga", "fine-1", "retry", "--reason", "r"]).refused();
    assert!(refused.contains("saga fine-1 has ended"), "{refused}");
    let refused = place.annals(&["saga", "lost-1", "skip-step", "--reason", "r"]).refused();
    assert!(
        refused.contains("skip-step saga.journey-lost-1? The action cannot be undone. Confirmation needs a terminal"),
        "{refused}"
    );

    let store: Arc<dyn EventStore> = Arc::new(place.open().await);
    let running = agency(&store, true).await;
    let declined = place.annals(&["saga", "lost-1", "compensate", "--reason", "go home", "--yes", "--wait", "60s"]);
    assert_eq!(declined.code, 1, "{declined:?}");
    assert!(declined.out.contains("declined: step \"announce guest\" only goes forward"), "{declined:?}");
    let retried = place.annals(&["saga", "lost-1", "retry", "--reason", "they are back", "--wait", "60s"]).fine();
    assert_eq!(retried, "saga.journey-lost-1: running at announce guest\n");
    until("it completes", async || sagas(&store).await.iter().all(|saga| saga.status != Status::Stuck)).await;
    running.drain(Duration::from_secs(30)).await.unwrap();
    let told = place.annals(&["saga", "lost-1"]).fine();
    for line in [
        "! tester requests compensate: go home",
        "! compensate declined: ",
        "! retry by tester: they are back",
        "= completed",
    ] {
        assert!(told.contains(line), "{line:?} is not in {told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn action_on_a_saga_waits_until_the_service_runs() {
    let place = Place::with_trips().await;
    let abandon = ["saga", "lost-1", "abandon", "--reason", "they have moved", "--yes", "--wait", "0s"];
    assert!(
        place
            .annals(&abandon)
            .fine()
            .contains("requested; the service of the saga carries out the action when the service runs")
    );
    assert!(place.annals(&abandon).refused().contains("tester has already requested Abandon"));
    let store: Arc<dyn EventStore> = Arc::new(place.open().await);
    let running = agency(&store, false).await;
    until("it is abandoned", async || sagas(&store).await.iter().all(|saga| saga.ended_at.is_some())).await;
    running.drain(Duration::from_secs(30)).await.unwrap();
    assert!(place.annals(&["saga", "lost-1"]).fine().starts_with("saga.journey-lost-1  abandoned\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn subscription_is_paused_resumed_and_reset() {
    let place = Place::with_trips().await;
    let lag = || {
        let rows = place.annals(&["subscriptions", "--sample", "0s", "--json"]).json();
        let brochure = rows.into_iter().find(|row| row["subscription"] == "brochure").unwrap();
        (brochure["position"].as_i64().unwrap(), brochure["waits_for"].clone())
    };
    let reset = ["subscription", "brochure", "reset", "--to", "beginning", "--reason", "once more"];
    assert!(place.annals(&reset).refused().contains("Confirmation needs a terminal"));
    assert!(place.annals(&[&reset[..], &["--yes"]].concat()).fine().contains("continues after position 0"));
    assert_eq!(lag().0, 0);
    let recent = ["subscription", "brochure", "reset", "--to", "1h", "--reason", "an hour ago", "--yes"];
    assert!(place.annals(&recent).fine().contains("continues after position 0"));
    let unexplained = place.annals(&["subscription", "brochure", "pause", "--reason", " "]).refused();
    assert!(unexplained.contains("the log records why an operator acted"), "{unexplained}");
    let pause = |verb: &str| place.annals(&["subscription", "brochure", verb, "--reason", "r"]);
    assert_eq!(pause("pause").fine(), "brochure: paused\n");
    assert!(pause("pause").refused().contains("is already paused"));
    assert_eq!(lag().1, "an operator: it is paused");
    assert_eq!(pause("resume").fine(), "brochure: resumed\n");
    for (name, to, said) in [
        (
            "agency.commands",
            "beginning",
            "agency.commands consumes agency.commands and does not follow the log: the group",
        ),
        ("nobody", "beginning", "there is no subscription nobody"),
        ("brochure", "999999", "is after the end of the log"),
        ("brochure", "-5", "position -5 does not exist: the log begins at 0"),
        ("brochure", "soon", "--to takes a position"),
    ] {
        let refused =
            place.annals(&["subscription", name, "reset", &format!("--to={to}"), "--reason", "r", "--yes"]).refused();
        assert!(refused.contains(said), "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn group_of_topics_is_redriven_but_not_paused_or_reset() {
    let place = Place::empty();
    let store: Arc<dyn EventStore> = Arc::new(place.open().await);
    let run = async |repaired: bool| {
        let group = Group::new("post.trips", &["agency.events"], Brochure { repaired });
        let agency = Service::new("agency", store.clone()).publish(&["trip"]);
        let post = Service::new("post", store.clone()).consume(group);
        let mut runtime = Runtime::new();
        runtime.start(vec![agency, post], Arc::new(LocalBus::default())).await.unwrap();
        runtime
    };
    let attempts = async || {
        let letters = annals::DeadLetters::new(store.clone()).list("post.trips").await.unwrap();
        letters.first().map(|letter| letter.parked.attempts)
    };
    let running = run(false).await;
    let order = TripEvent::Ordered { trip_id: "odd-7".into(), price: 1 };
    Repository::<Trip>::new(store.clone()).execute("odd-7", order, Uuid::new_v4()).await.unwrap();
    until("it is parked", async || attempts().await.is_some()).await;
    running.drain(Duration::from_secs(30)).await.unwrap();
    let rows = place.annals(&["subscriptions", "--sample", "0s", "--json"]).json();
    let row = rows.iter().find(|row| row["subscription"] == "post.trips").unwrap();
    assert_eq!((&row["waits_for"], &row["lag"]), (&"1 parked: see dead-letters".into(), &serde_json::Value::Null));
    for (verb, instead) in [
        (&["pause"][..], "`subscription SERVICE.relay pause`, on the store of the sending service"),
        (&["resume"], "a service that was stopped continues from its offsets"),
        (
            &["reset", "--to", "beginning", "--yes"],
            "`dead-letters redrive` makes the group handle parked messages again",
        ),
    ] {
        let refused = place.annals(&[&["subscription", "post.trips"], verb, &["--reason", "r"]].concat()).refused();
        let said = "post.trips consumes agency.events and does not follow the log: ";
        assert!(refused.contains(said) && refused.contains(instead), "{refused}");
    }
    let redrive = ["dead-letters", "redrive", "post.trips", "trip-odd-7", "--reason", "mended"];
    assert_eq!(place.annals(&redrive).fine(), "trip-odd-7: 1 message will be handled again\n");
    let running = run(true).await;
    until("it is handled", async || attempts().await.is_none()).await;
    running.drain(Duration::from_secs(30)).await.unwrap();
    let acts = place.annals(&["read", "operator-post.trips", "--json"]).json();
    assert_eq!((&acts[0]["type"], acts.len()), (&"operator.redriven".into(), 1), "{acts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn terminal_asks_for_confirmation() {
    let place = Place::with_trips().await;
    let annals = env!("CARGO_BIN_EXE_annals");
    let store = travel::url(&place.file("travel.db"));
    let session = |answer: &str| {
        let line = format!("{annals} dead-letters drop brochure trip-odd-1 --by ann --reason test --store {store}");
        let mut script = std::process::Command::new("script");
        script.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
        let answer = place.file(answer);
        std::fs::write(&answer, format!("{}\n", answer.file_name().unwrap().to_str().unwrap())).unwrap();
        travel::ended({
            script.stdin(std::fs::File::open(answer).unwrap());
            script
        })
    };
    let no = session("n");
    assert_eq!(no.code, 2, "{no:?}");
    assert!(
        no.out.contains("for good? The message failed with: no such place on the map. [y/N]")
            && no.out.contains("not confirmed: nothing was changed")
    );
    let yes = session("y");
    assert!(yes.code == 0 && yes.out.contains("trip-odd-1: dropped"), "{yes:?}");
}
