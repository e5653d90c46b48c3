use annals::testing::given;
use bank::{
    account::{Account, AccountCommand, AccountEvent, AccountRefusal},
    limit::{DAILY_LIMIT, Limit, LimitEvent, LimitReached, LimitStep},
    transfer::{NotRequested, Transfer, TransferCommand, TransferEvent},
};

fn opened() -> AccountEvent {
    AccountEvent::Opened { owner: "Ada".to_owned(), currency: "GBP".to_owned() }
}

fn deposited(pence: u64) -> AccountEvent {
    AccountEvent::Deposited { owner: "Ada".to_owned(), pence }
}

fn debit(pence: u64, currency: &str) -> AccountCommand {
    AccountCommand::Debit { transfer: "t".to_owned(), pence, currency: currency.to_owned() }
}

// ANCHOR: decisions
#[test]
fn account_is_never_overdrawn() {
    let debited = AccountEvent::Debited { owner: "Ada".to_owned(), transfer: "t".to_owned(), pence: 100 };
    given::<Account>([opened(), deposited(100)]).when(debit(100, "GBP")).then([debited]);
    given::<Account>([opened(), deposited(99)]).when(debit(100, "GBP")).refused(AccountRefusal::Overdrawn(99));
}

#[test]
fn account_is_opened_once_and_closed_when_it_is_empty() {
    let open = |owner: &str| AccountCommand::Open { owner: owner.to_owned(), currency: "GBP".to_owned() };
    given::<Account>([]).when(open("Ada")).then([opened()]);
    given::<Account>([opened()]).when(open("Ada")).nothing();
    given::<Account>([opened()]).when(open("Bob")).refused(AccountRefusal::Taken("Ada".to_owned()));
    given::<Account>([opened(), deposited(1)]).when(AccountCommand::Close).refused(AccountRefusal::NotEmpty(1));
    given::<Account>([]).when(AccountCommand::Deposit { pence: 1 }).refused(AccountRefusal::NotOpen);
}
// ANCHOR_END: decisions

#[test]
fn money_of_another_currency_is_refused() {
    let refusal = AccountRefusal::OtherCurrency("GBP".to_owned());
    given::<Account>([opened(), deposited(100)]).when(debit(100, "EUR")).refused(refusal);
}

#[test]
fn limit_counts_the_transfers_of_one_day() {
    let reserve = |day: &str, pence| LimitStep::Reserve {
        account: "a".to_owned(),
        day: day.to_owned(),
        transfer: "t".to_owned(),
        pence,
    };
    let reserved = |day: &str, pence| LimitEvent::Reserved { day: day.to_owned(), transfer: "t".to_owned(), pence };
    let monday = reserved("2026-11-30", DAILY_LIMIT - 1);
    given::<Limit>([monday.clone()]).when(reserve("2026-11-30", 2)).refused(LimitReached(1));
    given::<Limit>([monday.clone()]).when(reserve("2026-12-01", 2)).then([reserved("2026-12-01", 2)]);
    let released =
        LimitEvent::Released { day: "2026-11-30".to_owned(), transfer: "t".to_owned(), pence: DAILY_LIMIT - 1 };
    given::<Limit>([monday, released]).when(reserve("2026-11-30", 2)).then([reserved("2026-11-30", 2)]);
}

#[test]
fn transfer_ends_once() {
    let requested =
        || TransferEvent::Requested { from: "a".to_owned(), to: "b".to_owned(), pence: 1, currency: "GBP".to_owned() };
    let complete = || TransferCommand::Complete { transfer: "t".to_owned() };
    given::<Transfer>([]).when(complete()).refused(NotRequested);
    given::<Transfer>([requested()]).when(complete()).then([TransferEvent::Completed {}]);
    given::<Transfer>([requested(), TransferEvent::Completed {}]).when(complete()).nothing();
}
