//! `read-model`: shows the views of a read model, or rebuilds all views next to the live views.

use std::sync::Arc;

use annals::{
    EventStore, Operator, Scan,
    pages::PAGE,
    read_model::{Compared, Difference, Rebuild, live_collection},
};
use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::{
    confirm::ActionArgs,
    domain::Domain,
    failure::{Failure, Verdict},
    model::Model,
    output::{Output, grouped, short, shown},
    progress,
    stop::Stop,
    store::Store,
};

/// The maximum number of characters of a view in a table.
const VIEW_CHARS_MAX: usize = 100;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals read-model shelf --limit 20
      show the current views
  my-service ops read-model shelf compare
      build all views again from the log, next to the live views, and show the differences; exit code 1 if there are any
  my-service ops read-model shelf rebuild --reason \"returns were counted twice\"
      build and compare all views, and ask whether the new views replace the live views

Building views needs the service's own binary, which registers its read models with `annals_cli::Ops`. A build calls only the pure
functions of the read model, so no effect happens again. Services may run during the build. Readers see the live views until the
new views replace them, and a running service continues with the new views. The swap is an event in the stream operator-NAME.")]
pub(crate) struct ReadModelArgs {
    /// The stored name of the read model.
    name: String,
    /// Show views after this key.
    #[arg(long, value_name = "KEY", default_value = "")]
    after: String,
    /// Show at most this many views, or differences.
    #[arg(long, value_name = "N", default_value_t = 50, global = true)]
    limit: usize,
    #[command(subcommand)]
    verb: Option<ReadModelCommand>,
}

#[derive(Debug, Subcommand)]
enum ReadModelCommand {
    /// Build all views again, show how the live views differ, and remove the new views.
    Compare,
    /// Build all views again, show how the live views differ, and replace the live views.
    Rebuild {
        /// Replace the live views even if some events could not be applied. Those events stay parked as dead letters,
        /// and their views are incomplete.
        #[arg(long)]
        accept_parked: bool,
        /// Replace the live views even if a later version of the code built the live views.
        #[arg(long)]
        accept_older: bool,
        #[command(flatten)]
        act: ActionArgs,
    },
}

#[derive(Serialize)]
struct ViewRow {
    key: Arc<str>,
    view: Box<RawValue>,
}

/// The live view and the rebuilt view of one key.
#[derive(Serialize)]
struct ViewPair {
    key: Arc<str>,
    live: Option<Box<RawValue>>,
    rebuilt: Option<Box<RawValue>>,
}

pub(crate) async fn run(
    arguments: ReadModelArgs,
    store: &Store,
    domain: &Domain,
    output: &mut Output,
) -> Result<Verdict, Failure> {
    let Some(verb) = &arguments.verb else { return list(&arguments, store, output).await };
    let model = domain.read_model(&arguments.name)?;
    // Asks for the operator's name before the long build rather than after it.
    let act = match verb {
        ReadModelCommand::Compare => None,
        ReadModelCommand::Rebuild { act, .. } => Some((act, act.by()?)),
    };
    let stop = Stop::on_ctrl_c();
    let Some(built) = build(&*model, verb, store, &stop).await? else { return Ok(Verdict::Stopped) };
    let Some(compared) = stop.unless(compare(&built, arguments.limit, output)).await else {
        return stopped(built).await;
    };
    let fine = compared.as_ref().is_ok_and(|compared| compared.differences == 0 && compared.parked == 0);
    let agreed = match (&compared, act) {
        (Err(_), _) | (_, None) => None,
        (Ok(_), Some((act, by))) => {
            output.flush()?;
            let question = format!("Replace the live views of {}?", arguments.name);
            let Some(agreed) = act.confirm_unless(&stop, &question).await else { return stopped(built).await };
            Some(agreed.map(|()| (act, by)))
        }
    };
    match agreed {
        Some(Ok((act, by))) => {
            let rebuilt = Operator::new(store.port(), &by).swap(built, &act.reason).await?;
            if !output.json {
                output.line(&format!(
                    "swapped: {} new views replace {} old views",
                    grouped(rebuilt.views as i64),
                    grouped(rebuilt.views_before as i64)
                ))?;
                if rebuilt.parked > 0 {
                    output.line(&format!(
                        "{} events could not be applied to the new views: `dead-letters list {}@{}` shows them",
                        grouped(rebuilt.parked as i64),
                        arguments.name,
                        rebuilt.generation
                    ))?;
                }
            }
            Ok(Verdict::Fine)
        }
        Some(Err(refused)) => {
            built.discard().await?;
            Err(refused)
        }
        None => {
            built.discard().await?;
            compared.map(|_| if fine { Verdict::Fine } else { Verdict::Fault })
        }
    }
}

/// Builds the views next to the live views. Returns `None` if the user stopped the build.
async fn build(
    model: &dyn Model,
    verb: &ReadModelCommand,
    store: &Store,
    stop: &Stop,
) -> Result<Option<Rebuild>, Failure> {
    let bar = progress::bar("built", store.port().status().await?.head.0.unsigned_abs(), stop);
    let built = model.begin(store.port()).await.map_err(|error| Failure::new(error.to_string()))?;
    let built = match *verb {
        ReadModelCommand::Rebuild { accept_parked: true, accept_older: true, .. } => {
            built.accept_parked().accept_older()
        }
        ReadModelCommand::Rebuild { accept_parked: true, .. } => built.accept_parked(),
        ReadModelCommand::Rebuild { accept_older: true, .. } => built.accept_older(),
        _ => built,
    };
    let caught_up = stop.unless(built.catch_up(|position| bar.set_position(position.0.unsigned_abs()))).await;
    bar.finish_and_clear();
    match caught_up {
        Some(Ok(())) => Ok(Some(built)),
        Some(Err(error)) => {
            // If discarding fails too, the next build removes the remaining views. Only the first error is reported.
            _ = built.discard().await;
            Err(Failure::new(error.to_string()))
        }
        None => stopped(built).await.map(|_| None),
    }
}

/// Removes the new views, after the user has stopped the command.
async fn stopped(built: Rebuild) -> Result<Verdict, Failure> {
    built.discard().await?;
    eprintln!("stopped: the live views are unchanged");
    Ok(Verdict::Stopped)
}

/// Prints the differences up to a limit, and counts all of them.
async fn compare(built: &Rebuild, limit: usize, output: &mut Output) -> Result<Compared, Failure> {
    let mut count = 0;
    let mut broken = None;
    let compared = built.compare(|difference| {
        count += 1;
        if count <= limit && broken.is_none() {
            broken = show(&difference, output).err();
        }
    });
    let compared = compared.await?;
    if let Some(failure) = broken {
        return Err(failure);
    }
    let Compared { live, rebuilt, differences, uncertain, parked } = compared;
    if output.json {
        output.value(&serde_json::json!({
            "live": live, "rebuilt": rebuilt, "differences": differences, "uncertain": uncertain, "parked": parked,
        }))?;
        return Ok(compared);
    }
    if differences > limit {
        output.line(&format!(
            "and {} more: raise --limit to see more differences",
            grouped((differences - limit) as i64)
        ))?;
    }
    let number = |count: usize| grouped(count as i64);
    output.line(&format!(
        "{} live views and {} rebuilt views: {} {}",
        number(live),
        number(rebuilt),
        number(differences),
        if differences == 1 { "difference" } else { "differences" },
    ))?;
    if uncertain > 0 {
        output.line(&format!(
            "{} of these differences may only be a delay: the live views were never at the same position of the log",
            number(uncertain)
        ))?;
    }
    if parked > 0 {
        output.line(&format!("{} events could not be applied to the rebuilt views", number(parked)))?;
    }
    Ok(compared)
}

fn show(difference: &Difference, output: &mut Output) -> Result<(), Failure> {
    let Difference { key, live, rebuilt } = difference;
    if output.json {
        let read = |view: &Option<Arc<str>>| view.as_deref().map(raw).transpose();
        return output.value(&ViewPair { key: key.clone(), live: read(live)?, rebuilt: read(rebuilt)? });
    }
    let text =
        |view: &Option<Arc<str>>| view.as_deref().map_or_else(|| "none".to_owned(), |v| short(v, VIEW_CHARS_MAX));
    output.line(&format!("{}: live {}, rebuilt {}", shown(key), shown(&text(live)), shown(&text(rebuilt))))
}

fn raw(text: &str) -> Result<Box<RawValue>, Failure> {
    Ok(RawValue::from_string(text.to_owned())?)
}

async fn list(arguments: &ReadModelArgs, store: &Store, output: &mut Output) -> Result<Verdict, Failure> {
    let archive = store.port();
    let rows = loop {
        let collection = live_collection(&*archive, &arguments.name).await?;
        let rows = page(arguments, &*archive, &collection).await?;
        // If a rebuild has swapped the views during the read, the page may lack some views, so the page is read again.
        if live_collection(&*archive, &arguments.name).await? == collection {
            break rows;
        }
    };
    if rows.is_empty() && arguments.after.is_empty() {
        return Err(Failure::new(format!("this store has no views of a read model {}", arguments.name)));
    }
    output.list(&["KEY", "VIEW"], &rows, |row| vec![row.key.to_string(), short(row.view.get(), VIEW_CHARS_MAX)])?;
    Ok(Verdict::Fine)
}

async fn page(arguments: &ReadModelArgs, store: &dyn EventStore, collection: &str) -> Result<Vec<ViewRow>, Failure> {
    let mut rows: Vec<ViewRow> = Vec::new();
    let mut after: Arc<str> = arguments.after.as_str().into();
    while rows.len() < arguments.limit {
        let page = store.scan(collection, &Scan::After(after), PAGE.min(arguments.limit - rows.len())).await?;
        let Some(last) = page.last() else { break };
        after = last.key.id.clone();
        for document in &page {
            rows.push(ViewRow { key: document.key.id.clone(), view: raw(&document.body)? });
        }
    }
    Ok(rows)
}
