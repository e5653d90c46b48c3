//! The pure transition function of a saga, tested input by input.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use annals::{
    Event, Saga, SagaState,
    saga::{
        CallState, Input, OperatorAction, Outcome, Progress, Reply, Status,
        StepRef::{self, Closing, Forward, Undo},
        StepRequest, Transition, begin, transition,
    },
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use uuid::Uuid;

#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "trip")]
enum Trip {
    Hotel {},
    NoHotel {},
    Flight {},
    NoFlight {},
    Car {},
    NoCar {},
    Pay {},
    Ticket {},
    Apology {},
}

/// The outcomes that the saga learned, in order.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Learned(Vec<String>);

impl SagaState for Learned {
    fn learn(&mut self, step: &str, outcome: &Outcome) {
        self.0.push(match outcome {
            Outcome::Done(_) => format!("{step} done"),
            Outcome::Refused(reason) | Outcome::Failed(reason) | Outcome::Unknown(reason) => {
                format!("{step}: {reason}")
            }
        });
    }
}

fn ask(command: &Trip) -> StepRequest {
    StepRequest::to("agency", command)
}

/// A plan: first the hotel, then flight and car at the same time, then the pivot.
fn trip() -> Saga<Learned> {
    Saga::named("trip")
        .compensatable("hotel", |_| ask(&Trip::Hotel {}))
        .undo(|_| ask(&Trip::NoHotel {}))
        .attempts(3)
        .compensatable("flight", |_| ask(&Trip::Flight {}))
        .undo(|_| ask(&Trip::NoFlight {}))
        .and(|_| ask(&Trip::Car {}))
        .undo(|_| ask(&Trip::NoCar {}))
        .attempts(2)
        .timeout(Duration::from_secs(5))
        .pivot("pay", |_| ask(&Trip::Pay {}))
        .attempts(2)
        .retriable("ticket", |_| ask(&Trip::Ticket {}))
        .attempts(2)
        .when_compensated("apology", |_| ask(&Trip::Apology {}))
        .attempts(2)
        .deadline(Duration::from_secs(100))
        .build()
}

/// An input of the saga, in the short notation of these tests.
#[derive(Clone, Copy, Debug)]
enum In {
    /// The participant of this call has carried out the last request.
    Done(usize),
    Refused(usize),
    Failed(usize),
    /// A reply to an earlier step or attempt arrives.
    Late(StepRef, u32, &'static str),
    /// The step's timer is due.
    Timer,
    /// A timer fires before it is due.
    Early,
    /// The deadline of the saga passes.
    Deadline,
    Operator(OperatorAction),
}
use In::{Deadline, Done, Early, Failed, Late, Operator, Refused, Timer};

const SAGA_ID: Uuid = Uuid::from_u128(7);
const START: i64 = 1_000_000;

struct Run {
    saga: Saga<Learned>,
    context: Learned,
    progress: Progress,
    now: i64,
    ids: Vec<(StepRef, usize, Uuid)>,
}

impl Run {
    fn reply(&self, call: usize, outcome: Outcome) -> Input {
        Input::Reply(Reply { at: self.progress.at, call, attempt: self.progress.attempt, outcome })
    }

    /// Applies an input, and returns the result as one line.
    fn feed(&mut self, input: In) -> String {
        let input = match input {
            Done(call) => self.reply(call, Outcome::Done(json!(call))),
            Refused(call) => self.reply(call, Outcome::Refused("no".to_owned())),
            Failed(call) => self.reply(call, Outcome::Failed("not now".to_owned())),
            Late(at, attempt, outcome) => {
                let outcome = match outcome {
                    "done" => Outcome::Done(json!(null)),
                    "refused" => Outcome::Refused("late".to_owned()),
                    _ => Outcome::Failed("late".to_owned()),
                };
                Input::Reply(Reply { at, call: 0, attempt, outcome })
            }
            Timer => {
                self.now = self.progress.due.expect("a timer");
                Input::Due
            }
            Deadline => {
                self.now = self.progress.deadline.expect("a deadline");
                Input::Due
            }
            Early => Input::Due,
            Operator(verb) => Input::Operate(verb),
        };
        match transition(&self.saga, SAGA_ID, &self.context, &self.progress, &input, self.now) {
            Err(error) => format!("error: {error}"),
            Ok(None) => "nothing".to_owned(),
            Ok(Some(moved)) => self.take(moved),
        }
    }

    fn take(&mut self, moved: Transition<Learned>) -> String {
        (self.context, self.progress) = (moved.context, moved.progress);
        for command in &moved.send {
            let known = self.ids.iter().find(|(at, call, _)| (*at, *call) == (command.at, command.call));
            assert!(known.is_none_or(|(.., id)| *id == command.id), "an attempt has another id: {command:?}");
            self.ids.push((command.at, command.call, command.id));
            assert_eq!((command.at, command.attempt), (self.progress.at, self.progress.attempt), "{command:?}");
        }
        let asks: Vec<_> = moved.send.iter().map(|command| command.type_name.trim_start_matches("trip.")).collect();
        let progress = &self.progress;
        let mut line = format!("{:?} {} #{}", progress.status, progress.at, progress.attempt).to_lowercase();
        if !asks.is_empty() {
            line += &format!(" asks {}", asks.join(" and "));
        }
        if progress.retrying {
            line += " later";
        }
        line
    }
}

fn started(saga: Saga<Learned>) -> Run {
    let moved = begin(&saga, SAGA_ID, Learned::default(), START).unwrap();
    let progress = moved.progress.clone();
    let mut run = Run { saga, context: Learned::default(), progress, now: START, ids: Vec::new() };
    assert_eq!(run.take(moved), "running forward.0 #1 asks hotel");
    run
}

/// Applies the inputs to a trip that has just started, and compares the result of each input.
#[track_caller]
fn check(steps: &[(In, &str)]) -> Run {
    let mut run = started(trip());
    for (number, (input, expected)) in steps.iter().enumerate() {
        assert_eq!(run.feed(*input), *expected, "input {number}: {input:?}");
    }
    run
}

#[test]
fn saga_completes_when_every_step_succeeds() {
    let run = check(&[
        (Done(0), "running forward.1 #1 asks flight and car"),
        (Done(1), "running forward.1 #1"),
        (Done(0), "running forward.2 #1 asks pay"),
        (Done(0), "running forward.3 #1 asks ticket"),
        (Done(0), "completed forward.3 #1"),
        (Early, "nothing"),
        (Done(0), "nothing"),
        (Operator(OperatorAction::Abandon), "error: the saga has ended: Abandon does nothing"),
    ]);
    assert_eq!(run.context.0, ["hotel done", "flight done", "flight done", "pay done", "ticket done"]);
    assert_eq!((run.progress.ended, run.progress.wakes()), (Some(START), None));
}

#[test]
fn refusal_undoes_steps_in_reverse_order() {
    let run = check(&[
        (Done(0), "running forward.1 #1 asks flight and car"),
        (Done(0), "running forward.1 #1"),
        (Done(1), "running forward.2 #1 asks pay"),
        (Refused(0), "compensating undo.1 #1 asks no-flight and no-car"),
        (Done(0), "compensating undo.1 #1"),
        (Done(1), "compensating undo.0 #1 asks no-hotel"),
        (Done(0), "compensating closing.0 #1 asks apology"),
        (Done(0), "compensated closing.0 #1"),
    ]);
    assert_eq!(run.progress.failure.unwrap().reason, "no");
}

#[test]
fn refused_call_needs_no_undo_but_unanswered_call_does() {
    check(&[
        (Done(0), "running forward.1 #1 asks flight and car"),
        (Refused(1), "compensating undo.1 #1 asks no-flight"),
        (Done(1), "nothing"),
        (Done(0), "compensating undo.0 #1 asks no-hotel"),
    ]);
    check(&[(Refused(0), "compensating closing.0 #1 asks apology")]);
}

#[test]
fn failed_step_is_retried_with_doubling_delay() {
    let mut run = started(trip());
    let mut delays = Vec::new();
    for attempt in 1..3 {
        assert_eq!(run.feed(Failed(0)), format!("running forward.0 #{attempt} later"));
        assert_eq!(run.feed(Early), "nothing");
        assert_eq!(run.feed(Failed(0)), "nothing", "repeated");
        delays.push(run.progress.due.unwrap() - run.now);
        assert_eq!(run.feed(Timer), format!("running forward.0 #{} asks hotel", attempt + 1));
    }
    assert!((50..=100).contains(&delays[0]) && (100..=200).contains(&delays[1]), "{delays:?}");
    // A step that failed may have happened anyway, so it is undone too.
    assert_eq!(run.feed(Failed(0)), "compensating undo.0 #1 asks no-hotel");
    assert_eq!(run.context.0, ["hotel: not now"], "learned once, when it was given up");
}

#[test]
fn timeout_is_not_a_failure_and_retries_at_once() {
    let run = check(&[
        (Timer, "running forward.0 #2 asks hotel"),
        (Late(Forward(0), 1, "failed"), "nothing"),
        (Timer, "running forward.0 #3 asks hotel"),
        // A reply to any attempt counts.
        (Late(Forward(0), 1, "done"), "running forward.1 #1 asks flight and car"),
        (Timer, "running forward.1 #2 asks flight and car"),
        (Done(1), "running forward.1 #2"),
        (Timer, "compensating undo.1 #1 asks no-flight and no-car"),
        (Late(Forward(1), 2, "done"), "nothing"),
    ]);
    assert_eq!(run.progress.failure.unwrap().reason, "timeout: no answer from agency within 5s");
    // The saga waits 10 seconds twice, then 5 seconds twice.
    assert_eq!(run.now, START + 30_000);
}

#[test]
fn step_that_times_out_on_every_attempt_is_undone() {
    let run = check(&[
        (Timer, "running forward.0 #2 asks hotel"),
        (Timer, "running forward.0 #3 asks hotel"),
        (Timer, "compensating undo.0 #1 asks no-hotel"),
        (Late(Forward(0), 3, "done"), "nothing"),
        (Done(0), "compensating closing.0 #1 asks apology"),
    ]);
    assert_eq!(run.context.0, ["hotel: timeout: no answer from agency within 10s"]);
}

#[test]
fn only_unfinished_parallel_calls_are_retried() {
    check(&[
        (Done(0), "running forward.1 #1 asks flight and car"),
        (Failed(0), "running forward.1 #1"),
        (Failed(0), "nothing"),
        (Done(1), "running forward.1 #1 later"),
        (Timer, "running forward.1 #2 asks flight"),
        (Done(1), "nothing"),
        (Done(0), "running forward.2 #1 asks pay"),
    ]);
}

#[test]
fn deadline_compensates_the_saga_only_before_the_pivot() {
    let run = check(&[
        (Done(0), "running forward.1 #1 asks flight and car"),
        (Deadline, "compensating undo.1 #1 asks no-flight and no-car"),
    ]);
    assert_eq!((run.context.0.last().unwrap().as_str(), run.progress.deadline), ("flight: deadline", None));
    let run = check(&[
        (Done(0), "running forward.1 #1 asks flight and car"),
        (Done(0), "running forward.1 #1"),
        (Done(1), "running forward.2 #1 asks pay"),
    ]);
    assert_eq!(run.progress.deadline, None);
}

fn at_the_pivot() -> Run {
    check(&[
        (Done(0), "running forward.1 #1 asks flight and car"),
        (Done(0), "running forward.1 #1"),
        (Done(1), "running forward.2 #1 asks pay"),
    ])
}

#[track_caller]
fn go_on(run: &mut Run, steps: &[(In, &str)]) {
    for (number, (input, expected)) in steps.iter().enumerate() {
        assert_eq!(run.feed(*input), *expected, "input {number}: {input:?}");
    }
}

/// Returns a run that is stuck at the pivot: the outcome of the pivot is unknown, so the saga goes neither forward nor
/// back.
fn stuck_at_the_pivot() -> Run {
    let mut run = at_the_pivot();
    go_on(&mut run, &[(Timer, "running forward.2 #2 asks pay"), (Timer, "stuck forward.2 #2"), (Early, "nothing")]);
    assert_eq!(run.progress.wakes(), None);
    run
}

#[test]
fn pivot_that_times_out_is_stuck_until_an_operator_retries() {
    go_on(
        &mut stuck_at_the_pivot(),
        &[
            (Operator(OperatorAction::Retry), "running forward.2 #1 asks pay"),
            (Done(0), "running forward.3 #1 asks ticket"),
        ],
    );
}

#[test]
fn late_reply_to_a_stuck_pivot_is_kept_for_the_operator() {
    let mut run = stuck_at_the_pivot();
    go_on(&mut run, &[(Done(0), "stuck forward.2 #2"), (Done(0), "nothing")]);
    assert_eq!(run.progress.calls, [CallState::Done]);
    go_on(&mut run, &[(Operator(OperatorAction::Retry), "running forward.3 #1 asks ticket")]);

    let mut run = stuck_at_the_pivot();
    go_on(&mut run, &[(Failed(0), "stuck forward.2 #2"), (Failed(0), "nothing")]);
    go_on(&mut run, &[(Operator(OperatorAction::Retry), "running forward.2 #1 asks pay")]);

    // The participant has given its final answer, so further attempts would never bring another one.
    let mut run = stuck_at_the_pivot();
    go_on(&mut run, &[(Refused(0), "stuck forward.2 #2")]);
    go_on(&mut run, &[(Operator(OperatorAction::Retry), "compensating undo.1 #1 asks no-flight and no-car")]);
}

#[test]
fn an_operator_skips_the_step_compensates_or_abandons() {
    go_on(&mut stuck_at_the_pivot(), &[(Operator(OperatorAction::SkipStep), "running forward.3 #1 asks ticket")]);
    let back = "compensating undo.1 #1 asks no-flight and no-car";
    go_on(&mut stuck_at_the_pivot(), &[(Operator(OperatorAction::Compensate), back)]);
    let mut run = stuck_at_the_pivot();
    go_on(&mut run, &[(Operator(OperatorAction::Abandon), "stuck forward.2 #2"), (Done(0), "nothing")]);
    assert_eq!(run.progress.ended, Some(run.now));
    go_on(&mut run, &[(Operator(OperatorAction::Retry), "error: the saga has ended: Retry does nothing")]);
    for verb in [OperatorAction::Retry, OperatorAction::SkipStep, OperatorAction::Compensate, OperatorAction::Abandon] {
        let error = at_the_pivot().feed(Operator(verb));
        assert_eq!(error, format!("error: the saga is Running, not stuck: {verb:?} does not apply"));
    }
}

#[test]
fn refusal_after_the_pivot_is_a_failure_without_compensation() {
    let mut run = at_the_pivot();
    go_on(
        &mut run,
        &[
            (Done(0), "running forward.3 #1 asks ticket"),
            (Refused(0), "running forward.3 #1 later"),
            (Timer, "running forward.3 #2 asks ticket"),
            (Refused(0), "stuck forward.3 #2"),
            (
                Operator(OperatorAction::Compensate),
                "error: step \"ticket\" only goes forward: it cannot be compensated",
            ),
            (Operator(OperatorAction::Retry), "running forward.3 #1 asks ticket"),
            (Done(0), "completed forward.3 #1"),
        ],
    );
}

#[test]
fn failing_undo_is_stuck_until_an_operator_retries() {
    let mut run = check(&[(Deadline, "compensating undo.0 #1 asks no-hotel")]);
    go_on(
        &mut run,
        &[
            (Failed(0), "compensating undo.0 #1 later"),
            (Timer, "compensating undo.0 #2 asks no-hotel"),
            (Refused(0), "compensating undo.0 #2 later"),
            (Timer, "compensating undo.0 #3 asks no-hotel"),
            (Timer, "stuck undo.0 #3"),
            (Operator(OperatorAction::Compensate), "error: step \"hotel\" only goes forward: it cannot be compensated"),
            (Operator(OperatorAction::Retry), "compensating undo.0 #1 asks no-hotel"),
            (Done(0), "compensating closing.0 #1 asks apology"),
            (Timer, "compensating closing.0 #2 asks apology"),
            (Timer, "stuck closing.0 #2"),
            (Operator(OperatorAction::SkipStep), "compensated closing.0 #0"),
        ],
    );
    assert_eq!(run.context.0, ["hotel: deadline"], "undos teach nothing");
}

#[test]
fn replies_to_other_steps_change_nothing() {
    let mut run = at_the_pivot();
    for at in [Forward(0), Forward(1), Forward(3), Forward(9), Undo(0), Undo(1), Closing(0)] {
        for outcome in ["done", "refused", "failed"] {
            assert_eq!(run.feed(Late(at, 1, outcome)), "nothing", "{at:?} {outcome}");
        }
    }
    assert_eq!(run.feed(Done(7)), "nothing", "no such call");
}

#[test]
fn hash_distinguishes_plans_by_name_kind_order_and_calls() {
    let plan = || Saga::<Learned>::named("trip");
    let hotel = |_: &Learned| ask(&Trip::Hotel {});
    let car = |_: &Learned| ask(&Trip::Car {});
    let base = plan().compensatable("a", hotel).undo(hotel).compensatable("b", car).undo(car).build();
    let others = [
        Saga::named("tour").compensatable("a", hotel).undo(hotel).compensatable("b", car).undo(car).build(),
        plan().compensatable("b", car).undo(car).compensatable("a", hotel).undo(hotel).build(),
        plan().compensatable("a", hotel).undo(hotel).compensatable("c", car).undo(car).build(),
        plan().compensatable("a", hotel).undo(hotel).build(),
        plan().compensatable("a", hotel).undo(hotel).and(car).undo(car).compensatable("b", car).undo(car).build(),
        plan().compensatable("a", hotel).undo(hotel).pivot("b", car).build(),
        plan().compensatable("a", hotel).undo(hotel).retriable("b", car).build(),
        plan().compensatable("a", hotel).undo(hotel).when_compensated("b", car).build(),
    ];
    let mut hashes: Vec<_> = others.iter().chain([&base]).map(|saga| saga.hash().to_owned()).collect();
    hashes.sort();
    hashes.dedup();
    assert_eq!(hashes.len(), others.len() + 1, "each plan has its own hash");
    // Plans that differ only in commands and settings count as the same plan, so running sagas continue with them.
    let tuned = plan().compensatable("a", car).undo(car).attempts(2).timeout(Duration::from_secs(1));
    let tuned = tuned.compensatable("b", hotel).undo(hotel).deadline(Duration::from_secs(9)).build();
    assert_eq!(tuned.hash(), base.hash());
    assert_eq!(
        base.hash(),
        "855426530fec",
        "stored with every saga: it must not change with the code that computes it"
    );
}

#[test]
#[should_panic(expected = "saga \"trip\" has two steps named \"a\"")]
fn two_steps_with_one_name_are_refused() {
    let hotel = |_: &Learned| ask(&Trip::Hotel {});
    Saga::named("trip").compensatable("a", hotel).undo(hotel).pivot("a", hotel).build();
}

#[test]
fn step_name_that_no_store_accepts_is_refused() {
    for name in ["", "a\0"] {
        let build = || Saga::named("trip").pivot(name, |_: &Learned| ask(&Trip::Hotel {})).build();
        let refused = std::panic::catch_unwind(build).map(drop).unwrap_err();
        let reason = refused.downcast_ref::<String>().unwrap();
        assert!(reason.contains("the name is empty or contains U+0000"), "{name:?}: {reason}");
    }
}

#[test]
fn command_without_a_json_form_fails_its_step() {
    let saga = Saga::<Learned>::named("odd")
        .pivot("odd", |_| StepRequest::to("agency", &Odd::Number { nan: std::collections::BTreeMap::from([((), 1)]) }))
        .build();
    let moved = begin(&saga, SAGA_ID, Learned::default(), START).unwrap();
    assert_eq!((moved.progress.calls, moved.send, moved.progress.retrying), (vec![CallState::Failed], vec![], true));
    let trouble = moved.progress.trouble.unwrap().to_string();
    assert!(trouble.starts_with("odd: the step cannot be requested: odd.number has no JSON form"), "{trouble}");
}

#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "odd")]
enum Odd {
    Number { nan: std::collections::BTreeMap<(), i32> },
}

#[test]
fn status_says_when_a_saga_has_ended() {
    let ended = [Status::Completed, Status::Compensated];
    for status in [Status::Running, Status::Compensating, Status::Completed, Status::Compensated, Status::Stuck] {
        assert_eq!(status.has_ended(), ended.contains(&status));
    }
}
