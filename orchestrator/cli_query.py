"""Writing the rows of a query for people and for programs."""

import json
import math
import sys
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
from rich.table import Table as RichTable

from dt.errors import UserError
from dt.files import write_atomically
from orchestrator.cli_options import console

FORMS = ("table", "csv", "json", "parquet")


def write_rows(rows: pa.Table, form: str, output: Path | None) -> None:
    """Print the rows, or write them to `output`, in one of FORMS. Raises UserError for two columns of one name, or
    what the form cannot hold."""
    names = rows.column_names
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two columns are called {twice[0]!r}: give one of them another name with AS")
    if form == "table" and output is None:
        console.print(_rich(rows))
        return
    try:
        content = _bytes(rows, form)
    except pa.ArrowException as error:
        raise UserError(f"{form} cannot hold these rows ({error}): cast the column to text in the query") from error
    if output is not None:
        write_atomically(output.absolute(), content)
    else:
        sys.stdout.write(content.decode())


def _bytes(rows: pa.Table, form: str) -> bytes:
    sink = BytesIO()
    if form == "parquet":
        pq.write_table(rows, sink)
    elif form == "csv":
        csv.write_csv(_flat(rows), sink)
    elif form == "json":
        plain = [{name: _json(value) for name, value in row.items()} for row in rows.to_pylist()]
        sink.write(json.dumps(plain, default=str, ensure_ascii=False, indent=1).encode() + b"\n")
    else:
        lines = [rows.column_names, *([_cell(value) for value in row.values()] for row in rows.to_pylist())]
        sink.write("\n".join("\t".join(line) for line in lines).encode() + b"\n")
    return sink.getvalue()


def _flat(rows: pa.Table) -> pa.Table:
    """Lists and structures as JSON, for formats that have none."""
    for index, field in enumerate(rows.schema):
        if pa.types.is_nested(field.type):
            texts = [json.dumps(_json(value), default=str, ensure_ascii=False) for value in rows[index].to_pylist()]
            rows = rows.set_column(index, field.name, pa.array(texts, pa.string()))
    return rows


def _json(value: Any) -> Any:
    """What JSON can say: numbers as numbers, and null for those that are none."""
    if isinstance(value, Decimal):  # DuckDB's sum of integers
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _json(each) for name, each in value.items()}
    return [_json(each) for each in value] if isinstance(value, list) else value


def _rich(rows: pa.Table) -> RichTable:
    table = RichTable()
    for name in rows.column_names:
        table.add_column(name, overflow="fold")  # a narrow terminal breaks a value, it does not hide it
    for row in rows.to_pylist():
        table.add_row(*(_cell(value) for value in row.values()))
    table.caption = f"{rows.num_rows} rows"
    return table


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
