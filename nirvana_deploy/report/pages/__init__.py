"""Parts of the report, a module each: records in, sentences, tables and figures out."""
