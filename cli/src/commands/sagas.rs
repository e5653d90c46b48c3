//! `sagas`: lists sagas and their states.

use annals::{Archive, StoreError, pages, saga::SagaStatus};
use clap::{Args, ValueEnum};
use futures::TryStreamExt;

use crate::{
    failure::{Failure, Verdict},
    moment::{Span, age, span},
    output::{Output, short},
    store::Store,
};

/// The maximum number of rows in a table, unless `--limit` sets another.
const ROWS_DEFAULT: usize = 100;
/// The maximum number of characters of an error in a table.
const ERROR_CHARS_MAX: usize = 60;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals sagas --status stuck
      list sagas that wait for an operator
  annals sagas --saga checkout --older-than 1h --status running,compensating
      list checkouts that take too long")]
pub(crate) struct SagasArgs {
    /// Only sagas of this name, such as `checkout`.
    #[arg(long, value_name = "NAME")]
    saga: Option<String>,
    /// Only sagas in these states.
    #[arg(long, value_delimiter = ',')]
    status: Vec<StatusFilter>,
    /// Only sagas at this step, such as `charge card`.
    #[arg(long)]
    step: Option<String>,
    /// Only sagas that were started longer ago than this, such as 15m.
    #[arg(long, value_name = "DURATION")]
    older_than: Option<Span>,
    /// Show at most this many sagas [default: 100 in a table, all with --json].
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum StatusFilter {
    Running,
    Compensating,
    Completed,
    Compensated,
    Stuck,
}

impl StatusFilter {
    fn of(saga: &SagaStatus) -> Self {
        match saga.status {
            annals::saga::Status::Running => Self::Running,
            annals::saga::Status::Compensating => Self::Compensating,
            annals::saga::Status::Completed => Self::Completed,
            annals::saga::Status::Compensated => Self::Compensated,
            annals::saga::Status::Stuck => Self::Stuck,
        }
    }
}

pub(crate) async fn run(arguments: SagasArgs, store: &Store, output: &mut Output) -> Result<Verdict, Failure> {
    let archive = store.port();
    let limit = arguments.limit.unwrap_or(if output.json { usize::MAX } else { ROWS_DEFAULT });
    let started_before = arguments.older_than.map(Span::ago);
    let wanted = |saga: &SagaStatus| {
        (arguments.status.is_empty() || arguments.status.contains(&StatusFilter::of(saga)))
            && arguments.step.as_ref().is_none_or(|step| *step == saga.step)
            && started_before.is_none_or(|before| saga.started_at < before)
    };
    let mut rows = Vec::new();
    let mut found = 0;
    let mut more = false;
    'collections: for name in names(&*archive).await? {
        if arguments.saga.as_ref().is_some_and(|saga| *saga != name) {
            continue;
        }
        let collection = format!("saga.{name}");
        let mut documents = pages::collection(&*archive, &collection, "");
        while let Some(document) = documents.try_next().await? {
            let Ok(saga) = serde_json::from_str::<SagaStatus>(&document.body) else { continue };
            if !wanted(&saga) {
                continue;
            }
            if found == limit {
                more = true;
                break 'collections;
            }
            found += 1;
            if output.json {
                show(&[saga], output)?;
            } else {
                rows.push(saga);
            }
        }
    }
    show(&rows, output)?;
    if more && !output.json {
        output.flush()?;
        eprintln!("there are more sagas: raise --limit, or narrow the filter");
    }
    Ok(Verdict::Fine)
}

/// Returns the names of the sagas that have documents.
pub(crate) async fn names(archive: &dyn Archive) -> Result<Vec<String>, StoreError> {
    let collections = archive.collections().await?;
    Ok(collections.iter().filter_map(|name| name.strip_prefix("saga.").map(str::to_owned)).collect())
}

fn show(sagas: &[SagaStatus], output: &mut Output) -> Result<(), Failure> {
    output.list(&["SAGA", "ID", "STATUS", "STEP", "ATTEMPTS", "STARTED", "TOOK", "LAST ERROR"], sagas, |saga| {
        let ended = saga.ended_at.map_or_else(String::new, |ended| span(ended - saga.started_at));
        let error = saga.last_error.as_deref().unwrap_or_default();
        vec![
            saga.saga.clone(),
            saga.saga_id.clone(),
            format!("{:?}", saga.status).to_lowercase(),
            saga.step.clone(),
            saga.attempts.to_string(),
            age(saga.started_at) + " ago",
            ended,
            short(error, ERROR_CHARS_MAX),
        ]
    })
}
