//! Inserts many rows with one statement. The number of rows in a statement is one of a few fixed numbers.

use std::sync::LazyLock;

use annals::DocumentKey;
use sqlx::{Arguments, SqliteConnection, error::BoxDynError, sqlite::SqliteArguments};

use crate::group::{DocumentRow, EventRow};

/// The possible numbers of rows (widths) of a statement. For each width, the connection keeps one prepared statement.
/// Rows that are not needed are bound to NULL and cost next to nothing. An insert therefore takes one statement for
/// every 256 rows, or part of 256 rows.
const WIDTHS: [usize; 4] = [1, 8, 64, 256];

static APPEND_EVENTS: LazyLock<[String; 4]> =
    LazyLock::new(|| widened(include_str!("sql/append_events.sql"), "(?, ?, ?, ?, ?, ?, ?, ?, ?)"));
static PUT_DOCUMENTS: LazyLock<[String; 4]> =
    LazyLock::new(|| widened(include_str!("sql/put_documents.sql"), "(?, ?, ?, ?, ?)"));

fn widened(sql: &str, row: &str) -> [String; 4] {
    WIDTHS.map(|width| sql.replace(row, &vec![row; width].join(",\n")))
}

/// A row that can bind its values to a statement.
pub(crate) trait Bind {
    fn bind(self, arguments: &mut SqliteArguments) -> Result<(), BoxDynError>;
}

/// An event, and the time of its recording in microseconds.
impl Bind for (EventRow, i64) {
    fn bind(self, arguments: &mut SqliteArguments) -> Result<(), BoxDynError> {
        let (EventRow { position, stream, version, text }, recorded_at) = self;
        arguments.add(position)?;
        arguments.add(stream)?;
        arguments.add(version)?;
        arguments.add(text.id)?;
        arguments.add(text.type_name)?;
        arguments.add(text.schema_version)?;
        arguments.add(text.data)?;
        arguments.add(text.metadata)?;
        arguments.add(recorded_at)
    }
}

impl Bind for (DocumentKey, DocumentRow) {
    fn bind(self, arguments: &mut SqliteArguments) -> Result<(), BoxDynError> {
        let (key, row) = self;
        arguments.add(key.collection)?;
        arguments.add(key.id)?;
        arguments.add(row.version)?;
        arguments.add(row.body)?;
        arguments.add(row.due)
    }
}

pub(crate) async fn append_events(
    connection: &mut SqliteConnection,
    rows: Vec<(EventRow, i64)>,
) -> Result<(), sqlx::Error> {
    insert(connection, APPEND_EVENTS.as_slice(), rows).await
}

pub(crate) async fn put_documents(
    connection: &mut SqliteConnection,
    rows: Vec<(DocumentKey, DocumentRow)>,
) -> Result<(), sqlx::Error> {
    insert(connection, PUT_DOCUMENTS.as_slice(), rows).await
}

async fn insert<R: Bind>(
    connection: &mut SqliteConnection,
    statements: &'static [String],
    rows: Vec<R>,
) -> Result<(), sqlx::Error> {
    let mut rows = rows.into_iter();
    while rows.len() > 0 {
        let (width, sql) = WIDTHS
            .iter()
            .zip(statements)
            .find(|(width, _)| **width >= rows.len())
            .unwrap_or((&WIDTHS[WIDTHS.len() - 1], &statements[statements.len() - 1]));
        let mut arguments = SqliteArguments::default();
        for row in rows.by_ref().take(*width) {
            row.bind(&mut arguments).map_err(sqlx::Error::Encode)?;
        }
        sqlx::query_with(sql.as_str(), arguments).execute(&mut *connection).await?;
    }
    Ok(())
}
