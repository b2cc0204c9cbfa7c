"""What a report says, in the two languages. A test holds that both have the same sentences with the same gaps."""

from collections.abc import Callable
from typing import Any

WORDS: dict[str, dict[str, str]] = {
    "en": {
        "title": "Which method for {data}?",
        "summary": "In short",
        "use_base": "Use none of them: keep {base} as it is, or bring more rows.",
        "use": "Use {use}.",
        "use_cheapest": "Use {use}: among those that are as good as this data can show, it costs least.",
        "helps": "{best} is better than the base on rows that nobody has seen, and that is more than chance.",
        "no_gain": "No method is better than the base by more than chance; the best figure is that of {best}.",
        "loss_fell": "The held-out loss did fall, and its interval excludes none, with {methods}: more rows or steps may show it in the score too.",
        "worse_than_base": "Worse than the base, by more than chance: {methods}.",
        "better_than": "{best} is better than {methods} by more than chance.",
        "no_difference": "No difference that this data can show between {methods}.",
        "may_hide": "That does not say that they are equal: up to {amount} between {methods} could hide in so few rows and seeds.",
        "forgets_more": "More of general text is forgotten, and by more than chance, with {methods} than with {best}.",
        "peak_mb": "Of those that remain, least memory ({value}): {methods}.",
        "run_seconds": "Of those that remain, least time ({value}): {methods}.",
        "adapter_kb": "Of those that remain, smallest file ({value}): {methods}.",
        "as_cheap": "{methods} also cost the same within a tenth; the one with the better figure is named, and chance may have made it.",
        "failed": "Failed: {method}: {why}.",
        "cut": "To keep the budget of {budget}, fewer {what} were taken than asked for, before the first run.",
        "cut_trials": "learning rates", "cut_steps": "steps", "cut_seeds": "seeds",
        "seeds_cut": "The machine was slower than planned: {seeds} of {planned} seeds were run.",
        "steps_cut": "The machine was slower than planned: {steps} of {planned} steps were taken, by every method.",
        "rows_skipped": "Rows that could not be used were left out: {what}.",
        "edge": "The best learning rate of {methods} was the first or the last that was tried: beyond it may be a better one.",
        "one_seed": "There is one seed: the intervals do not know what another one would have given.",
        "cannot_show": "{rows} rows judge: too few to show any difference between {pairs} pairs, whatever the figures. Bring more rows "
        "({need} or more that judge), or compare fewer methods.",
        "few_rows": "{rows} rows judge: with so few, only large differences show.",
        "quality": "How good", "cost": "What it costs", "between": "One against the other", "examples": "Side by side",
        "pictures": "Pictures", "ran": "What was run", "again": "How to run it again", "limits": "What this does not say",
        "base_nf4": "base in 4 bits",
        "method": "method", "base": "base", "score": "score", "loss": "held-out loss", "forgetting": "forgetting",
        "overfitting": "overfitting", "numbers": "numbers learned", "file": "file", "memory": "peak memory", "time": "time of a run",
        "energy": "energy of a run", "rate": "learning rate", "pair": "pair", "difference": "difference", "chance": "p, corrected",
        "shown": "shown?", "yes": "yes", "no": "no", "question": "asked", "expected": "expected",
        "metric_exact_match": "exact match, % of answers", "metric_accuracy": "accuracy, %", "metric_chrf": "chrF, mean over rows, %",
        "metric_rouge": "ROUGE-L, %", "metric_loss": "held-out loss, nats a token",
        "axis_exact_match": "exact match (%)", "axis_accuracy": "accuracy (%)", "axis_chrf": "chrF (%)", "axis_rouge": "ROUGE-L (%)",
        "axis_loss": "loss (nats a token)", "axis_peak_mb": "peak memory (MB)", "axis_run_seconds": "time of a run alone (s)",
        "axis_forgetting": "forgetting (nats a token; right is worse)", "axis_step": "step", "axis_rate": "learning rate",
        "caption_quality": "The score of each method with its 95% interval. The dashed line is the base.",
        "caption_peak_mb": "Quality against memory. The grey line joins the methods that no other beats in both.",
        "caption_run_seconds": "Quality against time.",
        "caption_forgetting": "Quality against forgetting.",
        "caption_curves": "While they learned: loss on held-out rows that chose the state to keep. One line a seed.",
        "caption_rates": "The search: loss on those rows for each learning rate, in its first round.",
        "about_quality": "Means over {seeds} seed(s) and {rows} rows (score: {asked}), with 95% intervals over both (bootstrap over rows, Student's t "
        "for the seeds). Score: {metric}. Forgetting: change of the loss on general text; overfitting: by how much "
        "more the loss fell on learned rows than on new ones; both in nats a token (a row, for labels), more is worse.",
        "about_cost": "Memory and time of each method alone, in a process of its own, measured once over a few steps; time is that of "
        "{steps} steps. Memory is that of the whole process, libraries included.",
        "energy_assumed": "Energy is an estimate: seconds, times busy cores, times an assumed {watts:.0f} W a core.",
        "energy_meter": "Energy is an estimate from the processor's own meter, which counts all processes of the machine.",
        "energy_unknown": "Energy is not known here.",
        "about_tests": "Paired tests on the same rows and seeds, corrected for being {pairs} (Holm): if no two methods differed, one "
        "false alarm or more would come in 5 of 100 such reports.",
        "about_search": "Each method had {trials} learning rates over the same range around its usual one; the better half went on with "
        "twice the steps. Rates and states were chosen on {choose} rows that do not judge.",
        "about_limits": "It speaks of this base, these rows, rank {rank} and {steps} steps, and of no other. A method that lost here may "
        "win with more data, another rank or more steps. “No difference shown” is not “equal”.",
        "about_general": "Forgetting is measured on the loss of general text alone: skills that it does not hold may be lost unseen.",
        "fact_base": "base", "fact_data": "data", "fact_rows": "rows: learned, chosen by, judged by", "fact_machine": "machine",
        "fact_plan": "trials, steps, seeds", "fact_time": "time taken", "fact_budget": "budget", "nothing": "none",
    },
    "es": {
        "title": "¿Qué método para {data}?",
        "summary": "En breve",
        "use_base": "Ninguno: deja {base} como está, o trae más filas.",
        "use": "Usa {use}.",
        "use_cheapest": "Usa {use}: entre los que son igual de buenos hasta donde estos datos dejan ver, es el que menos cuesta.",
        "helps": "{best} es mejor que la base en filas que nadie ha visto, y por más que el azar.",
        "no_gain": "Ningún método supera a la base por más que el azar; la mejor cifra es la de {best}.",
        "loss_fell": "La pérdida en filas reservadas sí bajó, y su intervalo excluye que no, con {methods}: más filas o pasos pueden mostrarlo también en la nota.",
        "worse_than_base": "Peores que la base, por más que el azar: {methods}.",
        "better_than": "{best} es mejor que {methods}, por más que el azar.",
        "no_difference": "Ninguna diferencia que estos datos puedan mostrar entre {methods}.",
        "may_hide": "Eso no dice que sean iguales: hasta {amount} entre {methods} puede esconderse en tan pocas filas y semillas.",
        "forgets_more": "Se olvida más del texto general, y por más que el azar, con {methods} que con {best}.",
        "peak_mb": "De los que quedan, menos memoria ({value}): {methods}.",
        "run_seconds": "De los que quedan, menos tiempo ({value}): {methods}.",
        "adapter_kb": "De los que quedan, archivo más pequeño ({value}): {methods}.",
        "as_cheap": "{methods} cuestan además lo mismo, décima más o menos; se nombra el de mejor cifra, que puede deberse al azar.",
        "failed": "Falló: {method}: {why}.",
        "cut": "Para cumplir el plazo de {budget} se tomaron, antes de la primera ejecución, menos {what} que los pedidos.",
        "cut_trials": "tasas de aprendizaje", "cut_steps": "pasos", "cut_seeds": "semillas",
        "seeds_cut": "La máquina fue más lenta de lo previsto: se ejecutaron {seeds} de {planned} semillas.",
        "steps_cut": "La máquina fue más lenta de lo previsto: se dieron {steps} de {planned} pasos, con todos los métodos.",
        "rows_skipped": "Se dejaron fuera filas que no se podían usar: {what}.",
        "edge": "La mejor tasa de aprendizaje de {methods} fue la primera o la última que se probó: más allá puede haber otra mejor.",
        "one_seed": "Hay una sola semilla: los intervalos no saben qué habría dado otra.",
        "cannot_show": "Juzgan {rows} filas: muy pocas para mostrar diferencia alguna entre {pairs} parejas, sean cuales sean las cifras. Trae "
        "más filas ({need} o más que juzguen) o compara menos métodos.",
        "few_rows": "Juzgan {rows} filas: con tan pocas solo se ven diferencias grandes.",
        "quality": "Qué tan bueno", "cost": "Qué cuesta", "between": "Uno contra otro", "examples": "Lado a lado",
        "pictures": "Imágenes", "ran": "Qué se ejecutó", "again": "Cómo repetirlo", "limits": "Lo que esto no dice",
        "base_nf4": "base en 4 bits",
        "method": "método", "base": "base", "score": "nota", "loss": "pérdida en filas reservadas", "forgetting": "olvido",
        "overfitting": "sobreajuste", "numbers": "números aprendidos", "file": "archivo", "memory": "memoria máxima",
        "time": "tiempo de una ejecución", "energy": "energía de una ejecución", "rate": "tasa de aprendizaje", "pair": "pareja",
        "difference": "diferencia", "chance": "p, corregida", "shown": "¿se ve?", "yes": "sí", "no": "no",
        "question": "pregunta", "expected": "esperado",
        "metric_exact_match": "respuestas exactas, %", "metric_accuracy": "aciertos, %", "metric_chrf": "chrF, media de las filas, %",
        "metric_rouge": "ROUGE-L, %", "metric_loss": "pérdida en filas reservadas, nats por token",
        "axis_exact_match": "respuestas exactas (%)", "axis_accuracy": "aciertos (%)", "axis_chrf": "chrF (%)",
        "axis_rouge": "ROUGE-L (%)", "axis_loss": "pérdida (nats por token)", "axis_peak_mb": "memoria máxima (MB)",
        "axis_run_seconds": "tiempo de una ejecución sola (s)",
        "axis_forgetting": "olvido (nats por token; a la derecha, peor)", "axis_step": "paso", "axis_rate": "tasa de aprendizaje",
        "caption_quality": "La nota de cada método con su intervalo del 95 %. La línea cortada es la base.",
        "caption_peak_mb": "Calidad y memoria. La línea gris une los métodos a los que ningún otro gana en ambas.",
        "caption_run_seconds": "Calidad y tiempo.",
        "caption_forgetting": "Calidad y olvido.",
        "caption_curves": "Mientras aprendían: pérdida en las filas reservadas que eligen el estado que se guarda. Una línea por semilla.",
        "caption_rates": "La búsqueda: pérdida en esas filas para cada tasa de aprendizaje, en su primera ronda.",
        "about_quality": "Medias de {seeds} semilla(s) y {rows} filas (nota: {asked}), con intervalos del 95 % sobre ambas (bootstrap de las filas, t de "
        "Student para las semillas). Nota: {metric}. Olvido: cambio de la pérdida en texto general; sobreajuste: "
        "cuánto más bajó la pérdida en filas aprendidas que en nuevas; ambos en nats por token (por fila, si hay "
        "etiquetas), más es peor.",
        "about_cost": "Memoria y tiempo de cada método solo, en un proceso propio, medidos una vez en unos pocos pasos; el tiempo es el de "
        "{steps} pasos. La memoria es la de todo el proceso, con sus bibliotecas.",
        "energy_assumed": "La energía es una estimación: segundos, por núcleos ocupados, por {watts:.0f} W supuestos por núcleo.",
        "energy_meter": "La energía es una estimación del medidor del propio procesador, que cuenta todos los procesos de la máquina.",
        "energy_unknown": "La energía no se conoce aquí.",
        "about_tests": "Pruebas pareadas sobre las mismas filas y semillas, corregidas por ser {pairs} (Holm): si ningún método se "
        "diferenciara de otro, habría una falsa alarma o más en 5 de 100 informes así.",
        "about_search": "Cada método tuvo {trials} tasas de aprendizaje en el mismo rango alrededor de la suya usual; la mejor mitad siguió "
        "con el doble de pasos. Tasas y estados se eligieron en {choose} filas que no juzgan.",
        "about_limits": "Habla de esta base, estas filas, rango {rank} y {steps} pasos, y de nada más. Un método que aquí perdió puede ganar "
        "con más datos, otro rango o más pasos. «Ninguna diferencia a la vista» no es «iguales».",
        "about_general": "El olvido se mide solo en la pérdida de un texto general: lo que ese texto no contiene puede perderse sin verse.",
        "fact_base": "base", "fact_data": "datos", "fact_rows": "filas: aprendidas, para elegir, para juzgar", "fact_machine": "máquina",
        "fact_plan": "ensayos, pasos, semillas", "fact_time": "tiempo usado", "fact_budget": "plazo", "nothing": "ninguno",
    },
}  # fmt: skip


def words(lang: str) -> Callable[..., str]:
    """words(key, **gaps): a sentence in a language."""

    def say(key: str, **gaps: Any) -> str:
        return WORDS[lang][key].format(**gaps)

    return say
