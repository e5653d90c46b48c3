//! Sends a group of commits to the database in one round trip.

use chrono::{DateTime, Utc};
use sqlx::{PgConnection, Postgres, Row, postgres::PgArguments, query::Query};

use crate::{
    error::not_primary,
    group::{EventRow, EventText, GroupPlan, StreamState, Versions, Written},
    open::{Database, Purpose},
    read::{storable, time},
};

/// Calls [`append`] in a separate transaction. This takes one statement, unless a pooler requires an explicit
/// transaction. `history` is the number of the history when the group was submitted. Behind a pooler, this function
/// writes nothing if the number has changed; without a pooler, the caller has checked the number.
pub(crate) async fn append_alone(
    database: &Database,
    connection: &mut PgConnection,
    plan: &GroupPlan<'_>,
    history: u64,
) -> Result<(Option<Written>, Versions), sqlx::Error> {
    if !database.pooled {
        return append(database, connection, plan).await;
    }
    let appended = async {
        database.begin(connection, Purpose::Write).await?;
        if database.history.number() != history {
            return Err(not_primary("the log changed before the commit was written"));
        }
        append(database, connection, plan).await
    };
    match appended.await {
        Ok(appended) => sqlx::raw_sql("COMMIT").execute(connection).await.map(|_| appended),
        Err(error) => {
            // If the rollback fails as well, the next use of the connection reports the failure.
            sqlx::raw_sql("ROLLBACK").execute(connection).await.ok();
            Err(error)
        }
    }
}

/// Advances the sequence of positions if the log has events at higher positions.
pub(crate) async fn advance(database: &Database, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    database.begin(connection, Purpose::Write).await?;
    database.statements.advance.query().execute(&mut *connection).await?;
    sqlx::raw_sql("COMMIT").execute(connection).await.map(drop)
}

/// Appends a group. Returns the written positions (`None` if a guess was wrong), and the versions before the group.
pub(crate) async fn append(
    database: &Database,
    connection: &mut PgConnection,
    plan: &GroupPlan<'_>,
) -> Result<(Option<Written>, Versions), sqlx::Error> {
    if !database.operates
        && let Some(bases) = plan.only_appends()
        && let Some(written) = append_events(database, connection, plan, &bases).await?
    {
        return Ok((Some(written), Versions { streams: bases, events: Vec::new(), documents: Vec::new() }));
    }
    let GroupPlan { streams, documents, events, .. } = plan;
    let statement = if database.operates { &database.statements.operate } else { &database.statements.append };
    let query = statement
        .query()
        .bind(streams.iter().map(|stream| stream.id.as_str()).collect::<Vec<_>>())
        .bind(streams.iter().map(|stream| stream.base).collect::<Vec<_>>())
        .bind(streams.iter().map(|stream| stream.event).collect::<Vec<_>>())
        .bind(streams.iter().map(|stream| stream.held()).collect::<Vec<_>>())
        .bind(documents.iter().map(|document| &*document.key.collection).collect::<Vec<_>>())
        .bind(documents.iter().map(|document| &*document.key.id).collect::<Vec<_>>())
        .bind(documents.iter().map(|document| document.base).collect::<Vec<_>>())
        .bind(documents.iter().map(|document| document.fresh).collect::<Vec<_>>())
        .bind(documents.iter().map(|document| document.put.map(|_| document.steps)).collect::<Vec<_>>())
        .bind(documents.iter().map(|document| document.body().map(|body| &**body)).collect::<Vec<_>>())
        .bind(documents.iter().map(|document| due(document.put)).collect::<Vec<_>>())
        .bind(events.iter().map(|event| event.rank as i32).collect::<Vec<_>>())
        // Arrays count from 1.
        .bind(events.iter().map(|event| event.stream as i32 + 1).collect::<Vec<_>>())
        .bind(events.iter().map(|event| streams[event.stream].id.as_str()).collect::<Vec<_>>())
        .bind(events.iter().map(|event| event.step).collect::<Vec<_>>());
    // The result must be read to its end, because the row arrives before the transaction is committed.
    let rows = with_texts(query, events).fetch_all(connection).await?;
    let row = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    let positions: Option<Vec<i64>> = row.try_get(0)?;
    let recorded_at = time(row, 4)?;
    let written = positions.map(|positions| Written { positions, recorded_at });
    Ok((written, Versions { streams: row.try_get(1)?, events: row.try_get(2)?, documents: row.try_get(3)? }))
}

/// Appends a group that contains only appends. Returns `None` if a guess was wrong.
async fn append_events(
    database: &Database,
    connection: &mut PgConnection,
    plan: &GroupPlan<'_>,
    bases: &[i64],
) -> Result<Option<Written>, sqlx::Error> {
    let GroupPlan { streams, events, .. } = plan;
    if let ([event], [stream], [base]) = (&events[..], &streams[..], bases) {
        return append_one(database, connection, stream, base + event.step, event.text).await;
    }
    let query = database
        .statements
        .append_events
        .query()
        .bind(streams.iter().map(|stream| stream.id.as_str()).collect::<Vec<_>>())
        .bind(bases)
        .bind(streams.iter().map(|stream| stream.held()).collect::<Vec<_>>())
        .bind(events.len() as i32)
        .bind(events.iter().map(|event| event.rank as i32).collect::<Vec<_>>())
        .bind(events.iter().map(|event| streams[event.stream].id.as_str()).collect::<Vec<_>>())
        .bind(events.iter().map(|event| bases[event.stream] + event.step).collect::<Vec<_>>());
    let query = with_texts(query, events).bind(streams.iter().map(|stream| stream.event).collect::<Vec<_>>());
    let rows = query.fetch_all(connection).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    let recorded_at = time(row, 1)?;
    // Positions are drawn in the order of the ranks, but the rows may arrive in any order.
    let mut positions = rows.iter().map(|row| row.try_get(0)).collect::<Result<Vec<i64>, _>>()?;
    positions.sort_unstable();
    Ok(Some(Written { positions, recorded_at }))
}

/// Appends a group of one event. Returns `None` if a guess was wrong.
async fn append_one(
    database: &Database,
    connection: &mut PgConnection,
    stream: &StreamState<'_>,
    version: i64,
    text: &EventText,
) -> Result<Option<Written>, sqlx::Error> {
    let query = database
        .statements
        .append_one
        .query()
        .bind(stream.id.as_str())
        .bind(version)
        .bind(text.id)
        .bind(&*text.type_name)
        .bind(text.schema_version)
        .bind(&*text.data)
        .bind(&*text.metadata)
        .bind(stream.event);
    // The result must be read to its end, as in `append`.
    let rows = query.fetch_all(connection).await?;
    let Some(row) = rows.first() else { return Ok(None) };
    Ok(Some(Written { positions: vec![row.try_get(0)?], recorded_at: time(row, 1)? }))
}

/// Adds the last binds of the two statements that take arrays; these binds are the same in both.
fn with_texts<'q>(
    query: Query<'q, Postgres, PgArguments>,
    events: &'q [EventRow<'_>],
) -> Query<'q, Postgres, PgArguments> {
    query
        .bind(events.iter().map(|event| event.text.id).collect::<Vec<_>>())
        .bind(events.iter().map(|event| &*event.text.type_name).collect::<Vec<_>>())
        .bind(events.iter().map(|event| event.text.schema_version).collect::<Vec<_>>())
        .bind(events.iter().map(|event| &*event.text.data).collect::<Vec<_>>())
        .bind(events.iter().map(|event| &*event.text.metadata).collect::<Vec<_>>())
}

fn due(put: Option<&annals::Put>) -> Option<DateTime<Utc>> {
    put.and_then(|put| put.due).map(storable)
}
