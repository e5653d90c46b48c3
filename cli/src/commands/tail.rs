//! `tail`: prints events as they are recorded.

use std::time::Duration;

use annals::{Position, StoreError, pages::PAGE};
use clap::Args;

use super::read;
use crate::{
    event_filter::EventFilter,
    failure::{Failure, Verdict},
    output::Output,
    store::Store,
};

/// The first delay before an unavailable store is read again. The delay doubles up to `PAUSE_MAX`.
const PAUSE_MIN: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals tail --category order,payment
      print new orders and payments until Ctrl-C
  annals tail --type payment.declined --json >> declined.ndjson
  annals tail --where '$[?@.sku==\"85123A\"]' --from 0
      print every event about one product, from the beginning of the log")]
pub(crate) struct TailArgs {
    #[command(flatten)]
    filter: EventFilter,
    /// Start after this position instead of with new events.
    #[arg(long, value_name = "POSITION")]
    from: Option<i64>,
    /// End after this many events.
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

pub(crate) async fn run(arguments: TailArgs, store: &Store, output: &mut Output) -> Result<Verdict, Failure> {
    let events = store.port();
    let query = arguments.filter.query();
    let mut after = match arguments.from {
        Some(position) => Position(position.max(0)),
        None => events.status().await?.head,
    };
    let mut left = arguments.count.unwrap_or(u64::MAX);
    let mut pause = PAUSE_MIN;
    let history = events.history();
    let ended = tokio::signal::ctrl_c();
    tokio::pin!(ended);
    while left > 0 {
        let read = async {
            let page = events.read_log(&query, after, PAGE).await?;
            if page.next == after {
                events.wait(after).await?;
            }
            Ok::<_, StoreError>(page)
        };
        let page = tokio::select! {
            page = read => page,
            _ = &mut ended => return Ok(Verdict::Fine),
        };
        let page = match page {
            Ok(page) => page,
            Err(error @ (StoreError::Corrupt(_) | StoreError::Refused(_))) => return Err(error.into()),
            Err(error) => {
                eprintln!("{error}; trying again");
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    _ = &mut ended => return Ok(Verdict::Fine),
                }
                pause = (pause * 2).min(PAUSE_MAX);
                continue;
            }
        };
        pause = PAUSE_MIN;
        if events.history() != history
            && let Some(lost) = events.status().await?.lost_end
        {
            // The log has lost events that may have been printed already, so the output cannot be corrected.
            return Err(StoreError::Unavailable(lost.to_string()).into());
        }
        after = page.next;
        for event in page.events.iter().filter(|event| arguments.filter.has(&event.data)) {
            if left == 0 {
                break;
            }
            left -= 1;
            read::show(event, output)?;
        }
        output.flush()?;
    }
    Ok(Verdict::Fine)
}
