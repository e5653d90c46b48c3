//! The saga checker: correct sagas end cleanly under every fault. For a broken saga, the checker finds the shortest
//! history that shows the error.
#![allow(clippy::unwrap_used)]

use annals::{
    Event, Saga, SagaState, StepError,
    saga::{Outcome, Progress, Status, StepRef, StepRequest},
    testing::{Check, Violation, check},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

#[path = "saga_check/shop.rs"]
mod shop;

use shop::*;

/// Returns a check of a checkout saga in the shop, with every invariant of the shop.
fn in_the_shop(saga: Saga<Checkout>) -> Check<Checkout, Shop> {
    with_inventory(saga, inventory)
}

fn with_inventory(
    saga: Saga<Checkout>,
    inventory: fn(&mut Shop, Stock) -> Result<Value, StepError>,
) -> Check<Checkout, Shop> {
    check(saga, sample())
        .world(shop())
        .service("inventory", inventory)
        .service("payment", payment)
        .service("order", orders)
        .service("mail", mail)
        .always("no unit comes or goes by itself", |shop| shop.free + shop.reserved + shop.shipped == 2)
        .always("nothing ships unpaid", |shop| shop.shipped == 0 || shop.charged > 0)
        .at_end("a customer pays for what ships, and for nothing else", |shop, _| shop.charged == shop.shipped * 25)
        .at_end("nothing stays reserved", |shop, _| shop.reserved == 0)
        .at_end("the customer hears once how it ended", |shop, status| shop.mails == [status == Status::Completed])
        .at_end("the order says how it ended", |shop, status| match status {
            Status::Completed => shop.order == Placed::Confirmed,
            _ => shop.order == Placed::Cancelled,
        })
}

/// Returns the violation that the check finds with all faults enabled.
#[track_caller]
fn caught(check: Check<Checkout, Shop>) -> Violation {
    check.everything().run().expect_err("this saga is broken, and was not caught")
}

/// Compares the broken rule and the history, ignoring the lines that show the world.
#[track_caller]
fn shows(violation: &Violation, broken: &str, history: &[&str]) {
    let moves: Vec<_> = violation.history.iter().filter_map(|line| line.lines().next()).collect();
    assert!(violation.broken == broken && moves == history, "another history:\n{violation}");
}

#[test]
fn correct_checkout_ends_clean_under_every_fault() {
    let report = in_the_shop(checkout()).everything().ends_clean();
    println!("{report:?}");
    assert!((1_000..100_000).contains(&report.states), "{report:?}");
}

#[test]
fn correct_checkout_ends_clean_with_three_attempts() {
    let report = in_the_shop(checkout()).everything().attempts(3).ends_clean();
    println!("{report:?}");
}

#[test]
fn cancelled_or_out_of_stock_checkout_ends_clean() {
    let cancelled = Shop { order: Placed::Cancelled, ..shop() };
    let sold_out = Shop { free: 0, shipped: 2, charged: 50, ..shop() };
    for (world, sold) in [(cancelled, 0), (sold_out, 2)] {
        check(checkout(), sample())
            .world(world)
            .service("inventory", inventory)
            .service("payment", payment)
            .service("order", orders)
            .service("mail", mail)
            .at_end("nothing was sold", move |shop, _| shop.shipped == sold && shop.charged == sold * 25)
            .at_end("it was compensated", |_, status| status == Status::Compensated)
            .everything()
            .ends_clean();
    }
}

/// A plan that reserves and charges at the same time.
fn parallel() -> Saga<Checkout> {
    Saga::named("parallel")
        .compensatable("prepare", reserve)
        .undo(release)
        .and(charge)
        .undo(refund)
        .pivot("confirm order", confirm)
        .retriable("ship", ship)
        .retriable("notify customer", notify)
        .when_compensated("cancel order", cancel)
        .when_compensated("notify of cancellation", notify_cancelled)
        .build()
}

#[test]
fn correct_saga_with_a_parallel_step_ends_clean() {
    let report = in_the_shop(parallel()).everything().ends_clean();
    println!("{report:?}");
}

/// Records everything that the saga learns from outcomes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Diary(Vec<String>);

impl SagaState for Diary {
    fn learn(&mut self, step: &str, outcome: &Outcome) {
        self.0.push(format!("{step}: {outcome:?}"));
    }
}

#[test]
fn correct_saga_that_learns_every_answer_ends_clean() {
    let saga = Saga::<Diary>::named("diary")
        .compensatable("one", |_| StepRequest::to("mail", &Mail::Send { confirmed: true }))
        .undo(|_| StepRequest::to("mail", &Mail::Send { confirmed: false }))
        .compensatable("two", |_| StepRequest::to("mail", &Mail::Send { confirmed: true }))
        .undo(|_| StepRequest::to("mail", &Mail::Send { confirmed: false }))
        .compensatable("three", |_| StepRequest::to("mail", &Mail::Send { confirmed: true }))
        .undo(|_| StepRequest::to("mail", &Mail::Send { confirmed: false }))
        .build();
    let report = check(saga, Diary::default()).everything().ends_clean();
    println!("{report:?}");
}

#[test]
fn a_saga_without_a_world_is_checked_against_the_rules() {
    check(checkout(), sample()).everything().ends_clean();
}

#[test]
fn an_undo_that_does_nothing_is_caught() {
    let forgetful = |shop: &mut Shop, command| match command {
        Stock::Release { .. } => done(),
        command => inventory(shop, command),
    };
    let violation = caught(with_inventory(checkout(), forgetful));
    shows(
        &violation,
        "broken at the end (Compensated): nothing stays reserved",
        &[
            r#"the saga starts; it asks inventory for "reserve stock""#,
            r#"inventory does "reserve stock" (attempt 1)"#,
            r#"the saga's deadline passes; it asks inventory for the undo of "reserve stock"; it goes back"#,
            r#"inventory does the undo of "reserve stock" (attempt 1)"#,
            r#"the saga hears that the undo of "reserve stock" is done; it asks order for "cancel order""#,
            r#"order does "cancel order" (attempt 1)"#,
            r#"the saga hears that "cancel order" is done; it asks mail for "notify of cancellation""#,
            r#"mail does "notify of cancellation" (attempt 1)"#,
            r#"the saga hears that "notify of cancellation" is done; it is compensated"#,
        ],
    );
    assert_eq!(
        violation.history[1],
        "inventory does \"reserve stock\" (attempt 1)\n       world: Shop { free: 0, reserved: 2, shipped: 0, charged: 0, \
         order: Open, mails: [] }"
    );
    assert_eq!(
        violation.world,
        "Shop { free: 0, reserved: 2, shipped: 0, charged: 0, order: Cancelled, mails: [false] }"
    );
}

#[test]
fn undo_of_a_different_amount_is_caught() {
    let saga = Saga::named("checkout")
        .compensatable("charge card", charge)
        .undo(|it| StepRequest::to("payment", &Payment::Refund { cents: it.cents - 1 }))
        .pivot("confirm order", confirm)
        .build();
    let check = check(saga, sample())
        .world(shop())
        .service("payment", payment)
        .service("order", orders)
        .at_end("nobody pays for a cancelled order", |shop, _| shop.order == Placed::Confirmed || shop.charged == 0);
    shows(
        &caught(check),
        "broken at the end (Compensated): nobody pays for a cancelled order",
        &[
            r#"the saga starts; it asks payment for "charge card""#,
            r#"payment does "charge card" (attempt 1)"#,
            r#"the timer fires; it asks payment for "charge card" again (attempt 2)"#,
            r#"the timer fires; it asks payment for the undo of "charge card"; it goes back"#,
            r#"payment does the undo of "charge card" (attempt 1)"#,
            r#"the saga hears that the undo of "charge card" is done; it is compensated"#,
        ],
    );
}

/// The undo releases the units only if the reservation's reply reported a discount. If that reply never arrived, the
/// undo releases nothing.
#[test]
fn an_undo_that_needs_the_reply_of_its_step_is_caught() {
    let saga = Saga::named("checkout")
        .compensatable("reserve stock", reserve)
        .undo(|it| StepRequest::to("inventory", &Stock::Release { units: if it.discount > 0 { it.units } else { 0 } }))
        .pivot("confirm order", confirm)
        .retriable("ship", ship)
        .build();
    let check = || {
        check(saga.clone(), sample())
            .world(shop())
            .service("inventory", inventory)
            .service("order", orders)
            .at_end("nothing stays reserved", |shop, _| shop.reserved == 0)
    };
    shows(
        &caught(check()),
        "broken at the end (Compensated): nothing stays reserved",
        &[
            r#"the saga starts; it asks inventory for "reserve stock""#,
            r#"inventory does "reserve stock" (attempt 1)"#,
            r#"the timer fires; it asks inventory for "reserve stock" again (attempt 2)"#,
            r#"the timer fires; it asks inventory for the undo of "reserve stock"; it goes back"#,
            r#"inventory does the undo of "reserve stock" (attempt 1)"#,
            r#"the saga hears that the undo of "reserve stock" is done; it is compensated"#,
        ],
    );
    check().ends_clean();
}

/// The second attempt at the charge comes after the reservation has reported a discount, and asks for another amount.
#[test]
fn step_that_sends_another_command_on_retry_is_caught() {
    let saga = Saga::named("parallel")
        .compensatable("reserve stock", reserve)
        .undo(release)
        .and(|it: &Checkout| StepRequest::to("payment", &Payment::Charge { cents: it.cents - it.discount }))
        .undo(|it| StepRequest::to("payment", &Payment::Refund { cents: it.cents - it.discount }))
        .pivot("confirm order", confirm)
        .build();
    let services = check(saga, sample()).world(shop()).service("inventory", inventory).service("payment", payment);
    let check = services.service("order", orders);
    shows(
        &caught(check),
        "command payment.charge (forward.0, attempt 2) is asked for again with other content: first payment.charge \
         {\"cents\":50} to payment, then payment.charge {\"cents\":45} to payment; a service carries out whichever comes first",
        &[
            r#"the saga starts; it asks inventory for "reserve stock"; it asks payment for "reserve stock""#,
            r#"inventory does "reserve stock" (attempt 1)"#,
            r#"the saga hears that "reserve stock" is done"#,
            r#"the timer fires; it asks payment for "reserve stock" again (attempt 2)"#,
        ],
    );
}

#[test]
fn effect_visible_after_its_undo_is_caught() {
    let saga = Saga::named("checkout")
        .compensatable("notify customer", notify)
        .undo(notify_cancelled)
        .pivot("confirm order", confirm)
        .when_compensated("cancel order", cancel)
        .build();
    let check = check(saga, sample())
        .world(shop())
        .service("order", orders)
        .service("mail", mail)
        .always("no mail promises what may not come", |shop| {
            !shop.mails.contains(&true) || shop.order == Placed::Confirmed
        });
    shows(
        &caught(check),
        "broken: no mail promises what may not come",
        &[r#"the saga starts; it asks mail for "notify customer""#, r#"mail does "notify customer" (attempt 1)"#],
    );
}

#[test]
fn charge_of_a_cancelled_order_is_caught() {
    let saga = Saga::named("checkout")
        .compensatable("charge card", charge)
        .undo(refund)
        .compensatable("confirm order", confirm)
        .undo(cancel)
        .pivot("notify customer", notify)
        .build();
    let check = check(saga, sample())
        .world(shop())
        .service("payment", payment)
        .service("order", orders)
        .service("mail", mail)
        .always("a cancelled order is never charged", |shop| shop.order != Placed::Cancelled || shop.charged == 0);
    let violation = caught(check);
    assert_eq!(violation.broken, "broken: a cancelled order is never charged");
    assert!(violation.history[6].starts_with(r#"order does the undo of "confirm order" (attempt 1)"#), "{violation}");
    assert_eq!(violation.history.len(), 7, "{violation}");
}

#[test]
fn undo_sent_to_another_service_is_caught() {
    let saga = Saga::named("checkout")
        .compensatable("reserve stock", reserve)
        .undo(|it| StepRequest::to("payment", &Payment::Refund { cents: it.cents }))
        .pivot("confirm order", confirm)
        .build();
    let violation = check(saga, sample()).everything().run().unwrap_err();
    let expected = r#"
the saga was compensated, but "reserve stock" is still done
   1. the saga starts; it asks inventory for "reserve stock"
   2. inventory does "reserve stock" (attempt 1)
   3. the timer fires; it asks inventory for "reserve stock" again (attempt 2)
   4. the timer fires; it asks payment for the undo of "reserve stock"; it goes back
   5. payment has nothing to undo for the undo of "reserve stock" (attempt 1)
   6. the saga hears that the undo of "reserve stock" is done; it is compensated
  the world then: ()"#;
    assert_eq!(violation.to_string(), expected.trim_start());
}

#[test]
fn retriable_step_that_never_succeeds_is_caught() {
    let stubborn = |shop: &mut Shop, command| match command {
        Stock::Ship { .. } => Err(StepError::Refused("we do not ship there".to_owned())),
        command => inventory(shop, command),
    };
    let violation = caught(with_inventory(checkout(), stubborn));
    let expected = "the saga is stuck at \"confirm order\"; when an operator retries and all goes well from then on, it comes \
                    to \"ship\" and does not end";
    assert_eq!(violation.broken, expected);
}

#[test]
fn missing_service_is_caught() {
    let saga =
        Saga::named("checkout").pivot("confirm order", |_| StepRequest::to("orders", &Order::Confirm {})).build();
    let violation = caught(in_the_shop(saga));
    assert_eq!(violation.broken, "order.confirm goes to the service \"orders\", which the world does not have");
}

#[test]
fn command_unknown_to_its_service_is_caught() {
    let saga = Saga::named("checkout").pivot("confirm order", |_| StepRequest::to("mail", &Order::Confirm {})).build();
    let violation = caught(in_the_shop(saga));
    assert!(violation.broken.starts_with("the service \"mail\" cannot read order.confirm"), "{violation}");
}

#[test]
#[should_panic(expected = "saga \"checkout\": broken: nothing is ever charged\n   1. the saga starts")]
fn a_broken_saga_panics_with_its_history() {
    in_the_shop(checkout()).always("nothing is ever charged", |shop| shop.charged == 0).ends_clean();
}

#[test]
fn saga_without_faults_has_a_single_history() {
    let report = in_the_shop(checkout()).ends_clean();
    assert_eq!(report.states, 12, "the start, the begin, and for each of five steps: done, heard: {report:?}");
}

#[test]
fn check_that_does_not_see_every_state_fails() {
    let violation = in_the_shop(checkout()).everything().states_max(1_000).run().unwrap_err();
    let expected = "more than 1000 states: remove from the world and from the saga's state whatever does not matter";
    assert_eq!((violation.broken.as_str(), violation.history.len()), (expected, 0));
}

#[test]
fn world_without_services_is_reported() {
    let violation = check(checkout(), sample()).world(shop()).everything().run().unwrap_err();
    assert_eq!(violation.broken, "the world has no services: add them with `service`");
}

#[test]
fn a_service_that_panics_is_shown_with_its_history() {
    let clumsy = |shop: &mut Shop, command| match command {
        Stock::Release { .. } => panic!("out of hands"),
        command => inventory(shop, command),
    };
    let violation = caught(with_inventory(checkout(), clumsy));
    assert!(violation.broken.starts_with("the service \"inventory\", asked for stock.release"), "{violation}");
    assert!(violation.broken.ends_with("panicked: out of hands"), "{violation}");
    assert!(!violation.history.is_empty());
}

#[derive(Event, Clone, Debug)]
#[event(prefix = "act")]
enum Act {
    Do { step: String },
    Undo { step: String },
}

#[derive(Clone, Serialize, Deserialize)]
struct Nothing;
impl SagaState for Nothing {}

/// How many times each step was done and not undone, by the name of the step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Standing(std::collections::BTreeMap<String, i32>);

macro_rules! act {
    ($step:literal) => {
        |_| StepRequest::to("all", &Act::Do { step: $step.into() })
    };
}
macro_rules! undo {
    ($step:literal) => {
        |_| StepRequest::to("all", &Act::Undo { step: $step.into() })
    };
}

fn three() -> Saga<Nothing> {
    Saga::named("moved")
        .compensatable("book", act!("book"))
        .undo(undo!("book"))
        .compensatable("charge", act!("charge"))
        .undo(undo!("charge"))
        .pivot("confirm", act!("confirm"))
        .build()
}

/// A plan with one more step before the original steps, and one more step after them.
fn five() -> Saga<Nothing> {
    Saga::named("moved")
        .compensatable("look", act!("look"))
        .undo(undo!("look"))
        .compensatable("book", act!("book"))
        .undo(undo!("book"))
        .compensatable("charge", act!("charge"))
        .undo(undo!("charge"))
        .pivot("confirm", act!("confirm"))
        .retriable("tell", act!("tell"))
        .build()
}

fn one_further(progress: &Progress) -> Progress {
    let at = match progress.at {
        StepRef::Forward(step) => StepRef::Forward(step + 1),
        StepRef::Undo(step) => StepRef::Undo(step + 1),
        StepRef::Closing(step) => StepRef::Closing(step),
    };
    Progress { at, ..progress.clone() }
}

fn moved(earlier: Saga<Nothing>, to: Saga<Nothing>, migrate: fn(&Progress) -> Progress) -> Check<Nothing, Standing> {
    check(to, Nothing)
        .moved_from(earlier, migrate)
        .world(Standing::default())
        .service("all", |standing: &mut Standing, act: Act| {
            let (step, change) = match act {
                Act::Do { step } => (step, 1),
                Act::Undo { step } => (step, -1),
            };
            *standing.0.entry(step).or_default() += change;
            Ok(().into())
        })
        .always("nothing is done twice, or undone without having been done", |standing| {
            standing.0.values().all(|count| (0..=1).contains(count))
        })
        .at_end("a saga that goes back leaves nothing", |standing, status| {
            status == Status::Completed || standing.0.values().all(|count| *count == 0)
        })
}

#[test]
fn saga_migrated_at_any_moment_ends_clean() {
    let report = moved(three(), five(), one_further).everything().ends_clean();
    println!("{report:?}");
}

#[test]
fn a_migration_that_loses_a_step_is_caught() {
    let two = || {
        Saga::named("moved")
            .compensatable("charge", act!("charge"))
            .undo(undo!("charge"))
            .pivot("confirm", act!("confirm"))
            .build()
    };
    let one_back = |progress: &Progress| match progress.at {
        StepRef::Forward(step) if step > 0 => Progress { at: StepRef::Forward(step - 1), ..progress.clone() },
        _ => progress.clone(),
    };
    let violation = moved(three(), two(), one_back).every_timer_fires().run().expect_err("it loses the booking");
    assert!(violation.broken.contains("cannot be moved"), "{violation}");
}
