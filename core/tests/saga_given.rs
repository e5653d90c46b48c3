//! Given-when-then specifications of sagas: the outcomes that they accept, and the messages with which they fail.
#![allow(clippy::unwrap_used)]

use std::panic::catch_unwind;

use annals::{Aggregate, Event, testing::given};

#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "account")]
enum AccountEvent {
    Opened {},
    Paid {
        cents: i64,
    },
    Noted {
        #[serde(skip)]
        lost: i32,
    },
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Account {
    open: bool,
    cents: i64,
}

#[derive(Debug, PartialEq, thiserror::Error)]
enum AccountRefusal {
    #[error("there is no account")]
    NoAccount,
    #[error("{missing} cents are missing")]
    TooLittle { missing: i64 },
}

enum AccountCommand {
    Open,
    Pay(i64),
    Note,
}
use AccountCommand::{Note, Open, Pay};
use AccountEvent::{Noted, Opened, Paid};

impl Aggregate for Account {
    const CATEGORY: &'static str = "account";
    type Command = AccountCommand;
    type Event = AccountEvent;
    type Refusal = AccountRefusal;

    fn decide(&self, command: &AccountCommand) -> Result<Vec<AccountEvent>, AccountRefusal> {
        match command {
            Open if self.open => Ok(vec![]),
            Open => Ok(vec![Opened {}]),
            Pay(_) if !self.open => Err(AccountRefusal::NoAccount),
            Pay(cents) if self.cents + cents < 0 => Err(AccountRefusal::TooLittle { missing: -(self.cents + cents) }),
            Pay(cents) => Ok(vec![Paid { cents: *cents }]),
            Note => Ok(vec![Noted { lost: 7 }]),
        }
    }

    fn evolve(&mut self, event: &AccountEvent) {
        match event {
            Opened {} => self.open = true,
            Paid { cents } => self.cents += cents,
            Noted { .. } => {}
        }
    }
}

/// Returns the text that the failing test would print.
fn failure(test: fn()) -> String {
    let panic = catch_unwind(test).expect_err("the specification holds");
    panic.downcast::<String>().map(|text| *text).unwrap()
}

#[test]
fn specifications_hold_for_correct_aggregates() {
    given::<Account>([]).when(Open).then([Opened {}]);
    given::<Account>([Opened {}]).when(Open).nothing();
    let account = given::<Account>([Opened {}, Paid { cents: 5 }]).when(Pay(-2)).then([Paid { cents: -2 }]);
    assert_eq!(account, Account { open: true, cents: 3 });
    given::<Account>([]).when(Pay(1)).refused(AccountRefusal::NoAccount);
    given::<Account>([Opened {}])
        .when(Pay(-1))
        .refused_as(|refusal| matches!(refusal, AccountRefusal::TooLittle { missing: 1.. }));
    assert_eq!(given::<Account>([Opened {}]).state(), Account { open: true, cents: 0 });
}

#[test]
fn other_events_are_shown_as_a_difference() {
    let text = failure(|| _ = given::<Account>([Opened {}]).when(Pay(5)).then([Opened {}, Paid { cents: 6 }]));
    let expected = "\
other events follow (- expected, + actual):
    [
  -     Opened,
        Paid {
  -         cents: 6,
  +         cents: 5,
        },
    ]
";
    assert_eq!(text, expected);
}

#[test]
fn a_refusal_instead_of_events_is_shown() {
    let text = failure(|| _ = given::<Account>([]).when(Pay(5)).then([Paid { cents: 5 }]));
    assert!(text.ends_with("but it was refused: there is no account (NoAccount)"), "{text}");
}

#[test]
fn events_instead_of_a_refusal_are_shown() {
    let text = failure(|| given::<Account>([]).when(Open).refused(AccountRefusal::NoAccount));
    assert_eq!(text, "expected a refusal, but these events follow: [\n    Opened,\n]");
    let text = failure(|| given::<Account>([]).when(Pay(1)).nothing());
    assert_eq!(text, "expected []\nbut it was refused: there is no account (NoAccount)");
}

#[test]
fn another_refusal_is_shown() {
    let text = failure(|| given::<Account>([]).when(Pay(1)).refused(AccountRefusal::TooLittle { missing: 1 }));
    let start = "refused for another reason (- expected, + actual):\n  - TooLittle {\n";
    assert!(text.starts_with(start) && text.ends_with("  + NoAccount\n"), "{text}");
    let text = failure(|| given::<Account>([]).when(Pay(1)).refused_as(|_| false));
    assert_eq!(text, "refused for another reason: there is no account (NoAccount)");
}

#[test]
fn event_that_changes_through_json_is_shown() {
    let text = failure(|| _ = given::<Account>([]).when(Note).then([Noted { lost: 7 }]));
    assert!(text.starts_with("an event changes on its way through JSON"), "{text}");
    assert!(text.contains("  -     lost: 7,\n  +     lost: 0,\n"), "{text}");
    let text = failure(|| _ = given::<Account>([Noted { lost: 7 }]));
    assert!(text.starts_with("an event changes on its way through JSON"), "{text}");
}
